"""Which bucket each of many values falls in, for the few boundaries of a codebook: fast on the CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from optimum_qguard.formats.scratch import Scratch

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
    below = table.index_select(0, _bins(values, Scratch()))
    padded = torch.cat([boundaries, boundaries.new_tensor([torch.inf])])
    boundary = padded.index_select(0, below)
    flat = values.flatten()
    return below.add_(flat >= boundary if right else flat > boundary).view_as(values)


def neighbours(values: Tensor, alphabet: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor] | None:
    """Three neighbouring symbols of ``alphabet`` for each value, float32, shaped like ``values``: the value lies
    between the first and the second, or between the second and the third (which are equal at the upper end).

    ``None`` where the alphabet is too dense for that, or not on the CPU: `bucketize` works everywhere.

    Args:
        values: any shape, float32, within the alphabet's range.
        alphabet: ``(n,)`` float32, strictly ascending, n at least 3.
        scratch: where the results are.
    """
    tables = _neighbour_tables(tuple(alphabet.tolist())) if values.device.type == "cpu" else None
    if tables is None:
        return None
    bins = _bins(values, scratch)
    results = [scratch.like(values, f"neighbour {index}") for index in range(3)]
    for table, result in zip(tables, results, strict=True):
        torch.index_select(table, 0, bins, out=result.view(-1))
    return results[0], results[1], results[2]


def _bins(values: Tensor, scratch: Scratch) -> Tensor:
    bins = scratch.like(values, "bins", torch.int32)
    torch.bitwise_right_shift(values.view(torch.int32), _DROPPED_BITS, out=bins)
    return bins.add_(_N_BINS // 2).view(-1)


@lru_cache(maxsize=64)
def _neighbour_tables(alphabet: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    below = _table(alphabet[1:-1])
    if below is None:
        return None
    symbols = torch.tensor(alphabet, device="cpu")
    index = below.long()
    return symbols[index], symbols[index + 1], symbols[(index + 2).clamp_(max=len(alphabet) - 1)]


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
