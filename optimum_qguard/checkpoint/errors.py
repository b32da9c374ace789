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
    """``text`` in one line, with what a terminal would obey or could not show (control characters, marks that turn the
    direction of writing) written as an escape sequence."""
    line = "".join(
        letter if letter.isprintable() else letter.encode("ascii", errors="backslashreplace").decode()
        for letter in text[: _LONGEST + 1].translate(_CONTROLS)
    )
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
