"""Errors of this package."""


class ScanError(ValueError):
    """A scan that cannot be done as asked; the message says what to do."""


def describe(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
