"""What can go wrong while protecting a checkpoint."""

from __future__ import annotations


class EncryptError(ValueError):
    """A checkpoint or key that cannot be used as asked; the message says what is wrong and what to do."""


class ArchitectureError(EncryptError):
    """The model's architecture is not known, or its checkpoint does not look like that architecture."""
