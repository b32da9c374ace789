"""Protect a checkpoint: the same outputs in BF16, broken by standard quantizers, undone by a key."""
