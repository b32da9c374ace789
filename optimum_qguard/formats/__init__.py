"""What each quantizer does to a tensor: scales, symbols, cells. Pure functions; of the package only `registry` is used.

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


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    return _REGISTRY.names()


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.look_up(name)()
