"""Which bucket each of many values falls in, for the few boundaries of a codebook: fast on the CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_DROPPED_BITS = 19  # of float32's 32: what stays is sign, exponent and 4 bits of mantissa
_N_BINS = 1 << (32 - _DROPPED_BITS)


def bucketize(values: Tensor, boundaries: Tensor, *, right: bool = False) -> Tensor:
    """``torch.bucketize`` for float32 ``values`` that are numbers, int32.

    torch searches in binary, about 30 ns a value on the CPU. Here the first 13 bits of a value look up all but one
    boundary, and one comparison settles that: about 4 ns. Boundaries too dense for that are left to torch.

    Args:
        values: any shape, float32.
        boundaries: ``(n,)`` float32, strictly ascending.
        right: where a value that equals a boundary goes: below it (``False``) or above it (``True``).
    """
    table = _table(tuple(boundaries.tolist())) if values.device.type == "cpu" else None
    if table is None:
        return torch.bucketize(values, boundaries, right=right, out_int32=True)
    bins = (values.view(torch.int32) >> _DROPPED_BITS).add_(_N_BINS // 2).flatten()
    below = table.index_select(0, bins)
    padded = torch.cat([boundaries, boundaries.new_tensor([torch.inf])])
    boundary = padded.index_select(0, below)
    flat = values.flatten()
    return below.add_(flat >= boundary if right else flat > boundary).view_as(values)


@lru_cache(maxsize=64)
def _table(boundaries: tuple[float, ...]) -> Tensor | None:
    """How many boundaries lie below each bin of floats that share their first bits, if none holds two of them."""
    edges = torch.tensor(boundaries)
    start = torch.arange(-_N_BINS // 2, _N_BINS // 2, dtype=torch.int32) << _DROPPED_BITS
    end = start | ((1 << _DROPPED_BITS) - 1)
    ends = torch.stack([start, torch.where(end.view(torch.float32).isnan(), start, end)]).view(torch.float32)
    below = torch.searchsorted(edges, ends.amin(0), out_int32=True)
    within = torch.searchsorted(edges, ends.amax(0), right=True, out_int32=True) - below
    return below if int(within.max()) <= 1 else None
