"""Layers by what they are in a block, and by the block's number: how a bit map is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def by_kind(layers: Mapping[str, Value]) -> dict[str, dict[int, Value]]:
    """Values by kind and block number, each in its order of appearance; a layer outside of blocks is of its own kind,
    with number 0.

    >>> by_kind({"model.layers.0.mlp.up_proj": 4, "model.layers.1.mlp.up_proj": 8, "lm_head": 6})
    {'mlp.up_proj': {0: 4, 1: 8}, 'lm_head': {0: 6}}
    """
    split = {name: _split(name) for name in layers}
    prefixes = {prefix for prefix, _, number in split.values() if number is not None}
    found: dict[str, dict[int, Value]] = {}
    for name, value in layers.items():
        prefix, kind, number = split[name]
        if number is None:
            found[name] = {0: value}
        else:
            found.setdefault(kind if len(prefixes) == 1 else f"{prefix}.*.{kind}", {})[number] = value
    return found


def _split(name: str) -> tuple[str, str, int | None]:
    match = _NUMBER.search(name)
    if match is None:
        return name, "", None
    return name[: match.start()], name[match.end() :], int(match[1])
