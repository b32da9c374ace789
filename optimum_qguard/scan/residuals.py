"""Where weights lie inside the cells that a quantizer would put them in, as one histogram per tensor and format.

A weight's position in its cell is 0 on the symbol and 1 on the cell's border, on either side. Positions of a model that
was only trained are spread evenly: cells are small against the spread of the weights (on an evenly spaced grid of step
s, the density of the positions departs from 1 by 2·exp(-2π²σ²/s²) for normal weights, 5e-9 at σ = s).

Left out are weights that would tell of other things: in the cells of a block's extreme values (which set the scale, and
so lie where they lie by definition), in zero's cell (where pruned and very small weights are), in blocks whose weights
are mostly within a step of zero (there cells are as wide as the density), and repeated rows. All of these are counted
at position 0, and so is what lies there by chance.

A weight in BF16 or FP16 stands for all numbers that round to it, which may be half a step apart: it is spread evenly
over them, so that a quantizer's grid never meets a floating-point one. Of BF16 weights in 8-bit formats only those
within 8 steps of zero are looked at, which that moves by at most 1/64 of a step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_qguard.formats.scratch import Scratch
from optimum_qguard.scan.cells import SYMMETRIC_GROUPS
from optimum_qguard.scan.dithering import CHUNK, dithered, is_rounded
from optimum_qguard.scan.places import BINS, SEARCHED, find_places, find_places_in_k_quant, plan_for
from optimum_qguard.scan.sample import Sample

NEAR = 1 / 10
"""Of the way to the cell's border, within which nearly all weights lie that were quantized before."""

NEAREST_BINS = 4

LEAST_WEIGHTS = 4096
"""That a tensor must have for anything to be said about it."""

QUICK_WEIGHTS, QUICK_SHARE = 1 << 14, 1 / 400
"""That a quick scan looks at in each tensor: so many, or that share if it is more."""

GROUP = 2048
"""Weights next to each other, whose histograms are compared: equal values there make them differ too much."""

_TOGETHER = 4
_COMPARED = 8  # runs of 256 weights
_OFF_GRID = 0.1  # steps, on average; 0.25 by chance

_KEPT = threading.local()


@dataclass
class Histograms:
    """Of one tensor, or of a piece of one.

    Attributes:
        cells: indices into `CELLS` of what it was looked at for, ascending.
        counts: ``(n_cells, BINS)`` int64; the first bin also counts what is left out.
        below: ``(n_cells, 3)`` int64, of those below their symbol, where nothing left out is counted: how many are in
            the nearest `NEAREST_BINS`, how many within `NEAR` of it, and how many there are.
        chi_square, freedom: ``(n_cells,)`` of how much groups of weights differ in their histograms, and its degrees of
            freedom; the ratio is 1 where positions are independent.
        repeated, compared: of some ``compared`` weights that are not zero, how many equal one of the 256 around them.
        dequantized: ``(3,)`` int64, how many of these lie on a 4-bit symmetric grid of each of `SYMMETRIC_GROUPS`.
    """

    cells: tuple[int, ...]
    counts: NDArray[np.int64]
    below: NDArray[np.int64]
    chi_square: NDArray[np.float64]
    freedom: NDArray[np.float64]
    repeated: int
    compared: int
    dequantized: NDArray[np.int64]

    def add(self, other: Histograms) -> None:
        """Take in another piece of the same tensor."""
        if other.cells != self.cells:
            raise ValueError("histograms of different tensors do not add up")
        self.counts = self.counts + other.counts
        self.below = self.below + other.below
        self.chi_square = self.chi_square + other.chi_square
        self.freedom = self.freedom + other.freedom
        self.repeated += other.repeated
        self.compared += other.compared
        self.dequantized = self.dequantized + other.dequantized


def histograms(samples: Sequence[Sample]) -> list[Histograms | None]:
    """Look where the weights of each sample lie; ``None`` for vectors and tensors too small to say anything about.

    Samples of one size are looked at together: most of the time of a small one is the overhead of calls.
    """
    found: list[Histograms | None] = [None] * len(samples)
    alike: dict[object, list[tuple[int, Tensor]]] = {}
    for number, sample in enumerate(samples):
        columns = sample.shape[-1] if len(sample.shape) > 1 else 0
        if columns and math.prod(sample.shape) >= LEAST_WEIGHTS and plan_for(columns) is not None:
            rows = _few(sample)
            alike.setdefault((rows.dtype, rows.shape, is_rounded(rows)), []).append((number, rows))
    for members in alike.values():
        size = members[0][1].numel()
        together = max(1, CHUNK // size) if size % SEARCHED == 0 else 1
        for start in range(0, len(members), together):
            numbers, rows_of = zip(*members[start : start + together], strict=True)
            # Of integers, so the same in every process.
            draw = hash(tuple(samples[number].first_rows for number in numbers))
            for number, histogram in zip(numbers, _look(rows_of, draw), strict=True):
                found[number] = histogram
    return found


def _few(sample: Sample) -> Tensor:
    """The rows to look at: of a quick scan's some, from all of its runs, that end where blocks do."""
    rows, columns = sample.rows, sample.rows.shape[1]
    unit = SEARCHED // math.gcd(columns, SEARCHED)
    units = len(rows) // unit
    wanted = math.ceil(max(QUICK_WEIGHTS, QUICK_SHARE * math.prod(sample.shape)) / (unit * columns))
    if not sample.quick or wanted >= units:
        return rows
    chosen = torch.arange(wanted) * units // wanted
    return rows[: units * unit].view(units, unit, columns)[chosen].view(-1, columns)


def _look(rows_of: Sequence[Tensor], draw: int) -> list[Histograms]:
    """Histograms of samples whose rows have one shape; ``draw`` decides which of them is looked at in the K-quants,
    and in which one: a search takes longer than all else."""
    members, plan = len(rows_of), plan_for(rows_of[0].shape[1])
    assert plan is not None
    chosen = tuple(sorted(plan.looked + plan.searched))
    counts = np.zeros((members, len(chosen), BINS), dtype=np.int64)
    below = np.zeros((members, len(chosen), 3), dtype=np.int64)
    chi_square, freedom = np.zeros((members, len(chosen))), np.zeros((members, len(chosen)))
    rows = rows_of[0] if members == 1 else torch.cat(list(rows_of))
    scratch = _scratch()
    for number, chunk in enumerate(_chunks(rows) if members == 1 else [rows]):
        spread, coarse = dithered(chunk, scratch)
        _leave_out_repeated(chunk, spread, members)
        looked = [(plan.looked, slice(None), _found(find_places(chunk, spread, plan, scratch, coarse=coarse), members))]
        if number < len(plan.searched):
            turn, one = plan.searched[(draw + number) % len(plan.searched)], draw // len(plan.searched) % members
            stored, moved = (part.reshape(members, -1)[one] for part in (chunk, spread))
            if len(stored) >= SEARCHED:
                looked.append(((turn,), slice(one, one + 1), _found(find_places_in_k_quant(stored, moved, turn), 1)))
        for indices, which, found in looked:
            at = which, [chosen.index(index) for index in indices]
            for total, of_chunk in zip((counts, below, chi_square, freedom), _summed(found), strict=True):
                total[at] += of_chunk
    return [
        Histograms(chosen, counts[member], below[member], chi_square[member], freedom[member], *repeated)
        for member, repeated in enumerate(_repeated(rows, members))
    ]


def _scratch() -> Scratch:
    """This thread's, kept from one tensor to the next."""
    if not hasattr(_KEPT, "scratch"):
        _KEPT.scratch = Scratch()
    scratch: Scratch = _KEPT.scratch
    return scratch


def _repeated(rows: Tensor, members: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """`Histograms.repeated`, `Histograms.compared` and `Histograms.dequantized` of each member."""
    flat = rows.reshape(members, -1)[:, : _COMPARED * 256]
    runs = flat[:, : flat.shape[1] // 256 * 256].reshape(members, -1, 256).float()
    ordered = np.sort(runs.numpy(), axis=2)
    repeated = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != 0)).sum((1, 2))
    compared = (ordered != 0).sum((1, 2))
    on_grid = np.zeros((members, len(SYMMETRIC_GROUPS)), dtype=np.int64)
    often = np.flatnonzero(repeated > compared / 4)
    for index, group in enumerate(SYMMETRIC_GROUPS if len(often) else ()):
        blocks = runs[often].view(len(often), -1, group)
        # Symbols are -8 to 7, and a block's greatest weight became one of the two.
        unit = 1 / blocks.abs().amax(2, keepdim=True).clamp_(min=1e-30)
        off = [_mean_distance(blocks * (end * unit)) for end in (7, 8)]
        on_grid[often, index] = group * (torch.minimum(*off) < _OFF_GRID).sum(1).numpy()
    yield from zip(repeated.tolist(), compared.tolist(), on_grid, strict=True)


def _mean_distance(units: Tensor) -> Tensor:
    """Of the numbers in each block to the nearest whole ones; overwrites ``units``."""
    return units.sub_(units.round()).abs_().mean(2)


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    """Ranges of rows that fit the cache and end where blocks do."""
    columns = rows.shape[1]
    unit = 256 // math.gcd(columns, 256)
    step = max(1, CHUNK // (unit * columns)) * unit
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _leave_out_repeated(rows: Tensor, spread: Tensor, members: int) -> None:
    """Set rows that are there already (unused tokens of a vocabulary, for instance) to zero in ``spread``."""
    if len(rows) < 2 * members or rows.shape[1] * rows.element_size() < 8:
        return
    keys = rows[:, : 8 // rows.element_size()].contiguous().view(torch.int64).view(members, -1)
    ordered, order = keys.sort(dim=1, stable=True)
    same = ordered[:, 1:] == ordered[:, :-1]
    if bool(same.any()):
        order += torch.arange(0, len(rows), keys.shape[1])[:, None]
        one, other = order[:, :-1][same], order[:, 1:][same]
        spread[other[(rows[one] == rows[other]).all(1)]] = 0


def _found(places: Tensor, members: int) -> Tensor:
    """How many are in each place, ``(n_formats, members, n_groups, 2 * BINS)``; overwrites ``places``."""
    formats, n = places.shape[0], places.shape[1] // members
    groups = max(1, n // GROUP)
    shape = formats, members, groups, 2 * BINS
    first = torch.arange(0, math.prod(shape), 2 * BINS, dtype=torch.int32).view(formats, members, groups, 1)
    whole = min(n, groups * GROUP)
    of_member = places.view(formats, members, n)
    of_member[:, :, :whole].view(formats, members, groups, -1).add_(first)
    of_member[:, :, whole:].add_(first[:, :, -1])
    return torch.bincount(places.view(-1), minlength=math.prod(shape)).view(shape)


def _summed(found: Tensor) -> list[NDArray[Any]]:
    """``counts``, ``below``, ``chi_square`` and ``freedom`` (see `Histograms`) of what was `_found`, each ``(members,
    n_formats, …)``."""
    formats, members, groups, _ = found.shape
    by_group = found[..., :BINS] + found[..., BINS:].flip(-1)
    below = found[..., BINS:].sum(2)
    nearest = [below[..., -NEAREST_BINS:], below[..., -round(NEAR * BINS) :], below]
    # Some bins taken together: there are too few weights in one. The first bin holds what is left out.
    inner = by_group.view(formats, members, groups, -1, _TOGETHER)[..., 1:, :].sum(-1, dtype=torch.float32)
    of_group, of_bins = inner.sum(-1, keepdim=True), inner.sum(2, keepdim=True)
    of_all = of_bins.sum((2, 3))
    # Σ (O - E)² / E with E = (the group's sum) (the bins' sum) / total.
    chi_square = (inner.square() / (of_group * of_bins).clamp_(min=1)).sum((2, 3)) * of_all - of_all
    filled_bins, filled_groups = (of_bins > 0).sum((2, 3)), (of_group > 0).sum((2, 3))
    freedom = (filled_bins - 1).clamp_(min=0) * (filled_groups - 1).clamp_(min=0)
    parts = by_group.sum(2), torch.stack([part.sum(-1) for part in nearest], dim=-1), chi_square, freedom
    return [part.transpose(0, 1).numpy() for part in parts]
