"""JSON that a terminal can show: names in a report come from files that anybody may have made."""

from __future__ import annotations

import json


def json_document(content: object) -> str:
    """JSON whose strings are written as they are, but for what `printable` escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return (
        "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
        + "\n"
    )
