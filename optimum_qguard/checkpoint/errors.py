"""The error of this package: one clear line."""

from __future__ import annotations

_LONGEST = 1500


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message says what is wrong and what to do.

    Whatever a message quotes from a file or a server, it is one printable line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line without anything that a terminal or a log would act on: other letters become ``?``."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
