"""JSON from a repository, of which nothing is believed: it is one object, or one error, in bounded memory."""

from __future__ import annotations

import json
import re
from typing import Any

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BYTES_PER_CONTAINER = 16  # of what models need, at least; an empty list or object takes two, and 64 in memory
_FREE_CONTAINERS = 10_000


def parse_object(content: bytes, *, strict: bool = False) -> dict[str, Any]:
    """The object that ``content`` is.

    Args:
        strict: whether to refuse what parsers disagree on: a name that stands in one object twice, and ``-0``.

    Raises:
        ValueError: no JSON in UTF-8, no object, nested too deep, half characters (lone surrogates), or made of
            brackets: so many objects in so few bytes are meant to fill the memory.
    """
    containers = content.count(b"[") + content.count(b"{")
    if containers > _FREE_CONTAINERS + len(content) // _BYTES_PER_CONTAINER:
        raise ValueError(f"{containers:,} brackets in {len(content):,} bytes are not data but an attack")
    try:
        hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_int": _integer} if strict else {}
        found = json.loads(content.decode(), **hooks)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("not an object")
    if _SURROGATE.search(content):
        json.dumps(found, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for half of a pair
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no whole number")
    return int(digits)
