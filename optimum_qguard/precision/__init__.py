"""Precision per layer and over time: bit maps, nested codes, switching, cyclic training, allocation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_qguard.precision.bitmap import BitMap as BitMap
    from optimum_qguard.precision.errors import PrecisionError as PrecisionError
    from optimum_qguard.precision.nested import nest as nest
    from optimum_qguard.precision.nested_config import NestedConfig as NestedConfig
    from optimum_qguard.precision.switch import bits as bits
    from optimum_qguard.precision.switch import random_bits as random_bits
    from optimum_qguard.precision.switch import set_bits as set_bits
    from optimum_qguard.precision.switch import set_random_bits as set_random_bits

_WHERE = {
    "BitMap": "bitmap",
    "NestedConfig": "nested_config",
    "PrecisionError": "errors",
    "bits": "switch",
    "nest": "nested",
    "random_bits": "switch",
    "set_bits": "switch",
    "set_random_bits": "switch",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
