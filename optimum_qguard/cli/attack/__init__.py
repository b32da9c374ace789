"""The laboratory: attacks on models of your own, to test defences with. Payloads are harmless marker phrases."""
