"""Errors of this package."""


class ScanError(ValueError):
    """A scan that cannot be done as asked; the message says what to do."""
