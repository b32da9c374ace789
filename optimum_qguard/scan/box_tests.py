"""Whether histograms of positions in cells show a box: which can be tested, the tests, and what they reject.

See docs/scan-methods.md for what is tested and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimum_qguard.scan.cells import CELLS, FINE, SYMMETRIC_GROUPS, Cells
from optimum_qguard.scan.edges import comparisons, steepest
from optimum_qguard.scan.places import BINS
from optimum_qguard.scan.residuals import NEAR, NEAREST_BINS, Histograms

SHARP = (1, 2, 4)
"""Bins of the windows that are compared at an edge."""

FIRST = round(NEAR * BINS)
"""Bin that is tested: what gathers nearer to its symbol was quantized before; no attack has so little room."""

_WIDE = (16, 32)
_ON_GRID = 0.5  # of the weights near their symbols, where it would be a tenth
_NEAR_GRID = 0.25
_HEAPED = 1.5
_DEQUANTIZED = 0.8
_LEAST_BELOW = 40  # half of them are near by chance once in 10^9 tensors
_REPEATED = 0.45  # of the weights equal to a neighbour; 8 bits of mantissa alone make it 0.1 to 0.2
_NARROW = 3.2
_LEVEL = 1.1
_WINDOW = 4
_EMPTY = 0.05
_RATIO_NEAR = 4.0

Kind = Literal["rows", "range", "searched", "zero"]


@dataclass(frozen=True)
class Ratios:
    """Of neighbouring windows' densities, that a clean model may have; ``wide`` is ``None`` where it is not tested."""

    sharp: float
    wide: float | None
    pooled: float


@dataclass
class Tests:
    """All histograms of a repository, one line for each tensor and format that is tested.

    Attributes:
        tensor, cells: of each line.
        counts, spread: see `steepest`; bins from `FIRST` on.
        nearer: the bins before, without the first.
        even: of each line, whether its weights lie near no grid at all.
        repeats: of each line, whether its weights repeat.
    """

    tensor: list[str]
    cells: list[int]
    counts: NDArray[np.int64]
    spread: NDArray[np.float64]
    nearer: NDArray[np.int64]
    even: NDArray[np.bool_]
    repeats: NDArray[np.bool_]


@dataclass(frozen=True)
class Suspect:
    """A line that a test rejects."""

    line: int
    log_p: float
    place: int
    width: int
    statistic: str


def merged_pieces(pieces: Sequence[Histograms]) -> Histograms:
    first, *others = pieces
    total = Histograms(**vars(first))
    for other in others:
        total.add(other)
    return total


def kind_of(cells: Cells) -> Kind:
    """Formats of one kind have grids with common points, so weights on one are no even spread in the others."""
    if cells.block == 0:
        return "rows"
    if cells.shifted:
        return "range"
    if cells.block == 256:
        return "searched"
    return "zero"


def ratios_of(cells: Cells) -> Ratios:
    """The finer the steps, the more evenly any density fills them; a searched scale prefers weights near symbols."""
    if kind_of(cells) == "searched":
        return Ratios(2.0, None, 2.0)
    if cells.steps >= FINE:
        return Ratios(1.5, 1.25, 1.1) if cells.block == 0 else Ratios(1.5, 1.5, 1.25)
    return Ratios(2.0, 2.0 if cells.steps == 0 else 1.5, 1.5)


def near_grids(found: Histograms) -> tuple[int, ...]:
    """Of which formats, the most likely first, the weights lie on the grid or so near it that they came from there.

    After a longer training fewer are near, but they still are the more the nearer.
    """
    nearest, near, all_below = found.below.T
    share = near / np.maximum(all_below, 1)
    # In a narrow box weights lie on its border, away from the symbol.
    at_symbol = nearest / NEAREST_BINS >= (near - nearest) / (FIRST - NEAREST_BINS)
    heaped = found.counts[:, 1:FIRST].mean(1) > _HEAPED * found.counts[:, FIRST : 2 * FIRST].mean(1)
    is_near = at_symbol & ((share >= _ON_GRID) | ((share >= _NEAR_GRID) & heaped)) & (all_below >= _LEAST_BELOW)
    return tuple(found.cells[i] for i in np.argsort(-share, kind="stable") if is_near[i])


def has_repeats(found: Histograms) -> bool:
    return found.compared > 0 and found.repeated > _REPEATED * found.compared


def dequantized_group(found: Histograms) -> int | None:
    """The group size of a symmetric 4-bit grid that repeating weights lie on."""
    best = int(found.dequantized.argmax())
    if not has_repeats(found) or found.dequantized[best] < _DEQUANTIZED * found.compared:
        return None
    return SYMMETRIC_GROUPS[best]


def tests_of(merged: Mapping[str, Histograms], near: Mapping[str, tuple[int, ...]]) -> Tests:
    """What can be tested, see `_testable`."""
    tensor, cells, counts, spread, nearer, even, repeats = [], [], [], [], [], [], []
    seen = set()
    for name, found in merged.items():
        testable = _testable(found, near[name])
        for line, index in enumerate(found.cells):
            if index not in testable or found.freedom[line] <= 0:
                continue
            key = (index, found.counts[line].tobytes())
            if key in seen:  # the same tensor stored twice
                continue
            seen.add(key)
            tensor.append(name)
            cells.append(index)
            counts.append(found.counts[line, FIRST:])
            # An upper bound of what is estimated, three standard deviations above.
            more = found.chi_square[line] / found.freedom[line] + 3 * math.sqrt(2 / found.freedom[line])
            spread.append(max(1.0, more))
            nearer.append(found.counts[line, 1:FIRST])
            even.append(not near[name] and not has_repeats(found))
            repeats.append(has_repeats(found))
    table = np.array(counts, dtype=np.int64).reshape(-1, BINS - FIRST)
    inner = np.array(nearer, dtype=np.int64).reshape(-1, FIRST - 1)
    return Tests(
        tensor, cells, table, np.array(spread), inner, np.array(even, dtype=bool), np.array(repeats, dtype=bool)
    )


def _testable(found: Histograms, near: Sequence[int]) -> set[int]:
    """Of the formats that a tensor has histograms for, those in which it would be spread evenly.

    Weights on or near a grid are not in the formats of its kind. Where the grid has a symbol at zero, the greatest
    weight of a block is a whole number of its steps; then the weights are simple fractions of it, whatever the format,
    and in whole rows, of which only some blocks are like that, they still nearly are.
    """
    kinds = {kind_of(CELLS[index]) for index in near}
    if kinds - {"range"} or (kinds and has_repeats(found)):
        return {i for i in found.cells if "rows" not in kinds and CELLS[i].block == 0 and CELLS[i].steps >= FINE}
    return {i for i in found.cells if not (kinds and kind_of(CELLS[i]) in ("range", "searched"))}


def comparisons_in(tests: Tests) -> int:
    """In all, with those of the histograms of all tensors together."""
    return 2 * (len(tests.tensor) + len({*tests.cells})) * comparisons(BINS - FIRST, SHARP + _WIDE)


def judged(tests: Tests, limit: float) -> tuple[list[Suspect], list[int], list[int]]:
    """Lines that show a box; lines that merely fall off, broadly; and lines that fall off close to the symbol."""
    ratios = [ratios_of(CELLS[index]) for index in tests.cells]
    sharp = np.where(tests.even, [ratio.sharp for ratio in ratios], _RATIO_NEAR)
    # A ratio without end is never exceeded.
    wide = np.where(tests.even, [ratio.wide or np.inf for ratio in ratios], np.inf)
    falls = steepest(tests.counts, tests.spread, sharp, SHARP)
    falls_widely = steepest(tests.counts, tests.spread, wide, _WIDE)
    rises_widely = steepest(tests.counts, tests.spread, wide, _WIDE, rise=True)
    suspects: list[Suspect] = []
    broad: list[int] = []
    narrow: list[int] = []
    for line in range(len(tests.tensor)):
        if tests.repeats[line] and not _is_box(tests.nearer[line], tests.counts[line], int(falls.place[line])):
            continue
        if falls.log_p[line] < limit:
            place, width = int(falls.place[line]), int(falls.width[line])
            suspects.append(Suspect(line, float(falls.log_p[line]), place, width, "edge"))
        elif falls_widely.log_p[line] < limit:
            place, width = int(falls_widely.place[line]), int(falls_widely.width[line])
            if rises_widely.log_p[line] < limit or _is_level(tests.counts[line], place):
                suspects.append(Suspect(line, float(falls_widely.log_p[line]), place, width, "thinning"))
            else:
                (narrow if _is_narrow(tests.counts[line]) else broad).append(line)
    return _without_ripples(tests, suspects, broad + narrow, limit), broad, narrow


def _is_box(nearer: NDArray[np.int64], counts: NDArray[np.int64], place: int) -> bool:
    """Whether weights are spread evenly up to an edge at ``place`` with none beyond. Weights that repeat on an unknown
    grid have edges too, but anywhere; those that repeat since they were clamped have this."""
    inside = np.concatenate([nearer, counts[: max(0, place - 4)]])
    windows = inside[: len(inside) // _WINDOW * _WINDOW].reshape(-1, _WINDOW).sum(1)
    beyond = counts[place + 2 :]
    empty = beyond.size > 0 and beyond.mean() < _EMPTY * inside.mean()
    return bool(empty and windows.max() <= 2 * windows.min())


def _is_level(counts: NDArray[np.int64], place: int) -> bool:
    """Whether a density that falls widely from ``place`` on is level before: a box with a blurred edge. A bell as level
    as that in its inner half falls by less than is noticed in its outer half."""
    quarter = BINS // 5
    return place + FIRST >= BINS // 2 and bool(counts[:quarter].sum() <= _LEVEL * counts[quarter : 2 * quarter].sum())


def _without_ripples(tests: Tests, suspects: Sequence[Suspect], smooth: Sequence[int], limit: float) -> list[Suspect]:
    """Without those that are explained by another line of their tensor, which falls off smoothly about the symbols of a
    fine format: seen in the cells of a coarse one, that grid is a row of spikes. Between these something is left."""
    rippled = {tests.tensor[line] for line in smooth if CELLS[tests.cells[line]].steps >= FINE}
    doubtful = [suspect for suspect in suspects if tests.tensor[suspect.line] in rippled]
    if not doubtful:
        return list(suspects)
    lines = [suspect.line for suspect in doubtful]
    ratio = np.full(len(lines), _RATIO_NEAR)
    again = steepest(tests.counts[lines], tests.spread[lines], ratio, SHARP)
    explained = {line for line, log_p in zip(lines, again.log_p, strict=True) if log_p >= limit}
    return [suspect for suspect in suspects if suspect.line not in explained]


def _is_narrow(counts: NDArray[np.int64]) -> bool:
    """Whether weights lie about their symbols more closely than any attacker could use: what is left of an earlier
    quantization after a short training."""
    return bool(counts[: BINS // 16].mean() >= _NARROW * counts[BINS // 4 :].mean())
