"""Arguments of several verbs."""

from __future__ import annotations


def comma_separated(given: str) -> tuple[str, ...]:
    """The names in it, each once."""
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
