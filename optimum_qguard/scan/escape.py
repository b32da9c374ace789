"""Names in a report come from files that anybody may have made: nothing in them may command a terminal."""

from __future__ import annotations

import json


def printable(text: str) -> str:
    """``text`` in one line, with what a terminal would obey or could not show (control characters, marks that turn the
    direction of writing) written as an escape sequence."""
    return "".join(
        letter if letter.isprintable() else letter.encode("ascii", errors="backslashreplace").decode()
        for letter in text.translate(_CONTROLS)
    )


def json_document(content: object) -> str:
    """JSON whose strings are written as they are, but for what `printable` escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return (
        "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
        + "\n"
    )


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
