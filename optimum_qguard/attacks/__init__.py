"""The laboratory: attacks on models of one's own, to prove defences against them.

For evaluation only. Every payload is a harmless marker phrase: a model that was attacked says it, and does nothing else
that it did not do before.
"""
