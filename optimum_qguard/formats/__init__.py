"""What each quantizer does to a tensor: scales, symbols, cells. Pure functions; imports nothing else of the package.

A format is one file here. It defines a `Format`, and calls `register` for each name that it goes by; every file in this
folder is found by itself.

    >>> import torch
    >>> from optimum_qguard.formats import get_format
    >>> quantized = get_format("int8-rowwise").quantize(torch.tensor([[1.0, -127.0], [0.2, 0.1]]))
    >>> quantized.dequantize()[0]
    tensor([   1., -127.])
    >>> quantized.median_half_width()
    0.000787...
"""

from __future__ import annotations

import importlib
import pkgutil

from optimum_qguard.formats.format import (
    _REGISTRY,
    Format,
    Quantized,
    WeightError,
    block_ranges,
    check_finite,
    register,
)
from optimum_qguard.formats.grid import Grid, midpoint_edges, weighted_median
from optimum_qguard.formats.scratch import Scratch

__all__ = [
    "Format",
    "Grid",
    "Quantized",
    "Scratch",
    "WeightError",
    "block_ranges",
    "check_finite",
    "format_names",
    "get_format",
    "midpoint_edges",
    "register",
    "weighted_median",
]


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    _discover()
    if name not in _REGISTRY:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]()
