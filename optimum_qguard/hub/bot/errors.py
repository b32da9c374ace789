"""Errors of the bot."""


class BotError(ValueError):
    """The bot cannot start, or cannot do what it was asked; the message says what to do."""


class ScanFailed(Exception):
    """A scan that ended without a report; the message says why."""


class ScannerUnavailable(Exception):
    """Nothing can be scanned at the moment, which is no repository's fault."""
