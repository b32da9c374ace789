"""The error of this package: one clear line."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message says what is wrong and what to do."""
