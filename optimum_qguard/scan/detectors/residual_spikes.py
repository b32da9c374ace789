"""Whether weights were held inside quantization cells: their positions there have an edge that training never leaves.

An attacker who wants another model after quantization than before moves weights about inside their cells, and clamps
them to boxes so that none changes its symbol. What was clamped lies on the box's border, and nothing beyond it.
See docs/scan-methods.md for the tests and what they find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.edges import comparisons, steepest
from optimum_qguard.scan.finding import Conclusion, Finding, Plot
from optimum_qguard.scan.residuals import (
    BINS,
    CELLS,
    FINE,
    NEAR,
    NEAREST_BINS,
    SYMMETRIC_GROUPS,
    Cells,
    Histograms,
    histograms,
)
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject

_SHARP = (1, 2, 4)
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
_FIRST = round(NEAR * BINS)  # what gathers nearer to its symbol was quantized before; no attack has so little room
_RATIO_NEAR = 4.0
_WORST = 3
_NONE_BEYOND = 50

Kind = Literal["rows", "range", "searched", "zero"]


@dataclass(frozen=True)
class _Ratios:
    """Of neighbouring windows' densities, that a clean model may have; ``wide`` is ``None`` where it is not tested."""

    sharp: float
    wide: float | None
    pooled: float


@dataclass
class _Tests:
    """All histograms of a repository, one line for each tensor and format that is tested.

    Attributes:
        tensor, cells: of each line.
        counts, spread: see `steepest`; bins from `_FIRST` on.
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
class _Suspect:
    """A line that a test rejects."""

    line: int
    log_p: float
    place: int
    width: int
    statistic: str


@register
class ResidualSpikes(Detector):
    """See the module."""

    name: ClassVar[str] = "residual_spikes"
    summary: ClassVar[str] = "Weights are spread evenly inside quantization cells, not held back from their borders."

    def examine(self, sample: Sample) -> Histograms | None:
        """Histograms of the weights' positions in the cells of every format."""
        return histograms([sample])[0]

    def examine_many(self, samples: Sequence[Sample]) -> list[Histograms | None]:
        return histograms(samples)

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        merged = {tensor: _merged(pieces) for tensor, pieces in evidence.items()}
        if not merged:
            return Conclusion(not_run="it has no matrices of at least a few thousand weights")
        near = {tensor: _near_grids(found) for tensor, found in merged.items()}
        tests = _tests(merged, near)
        findings: list[Finding] = []
        suspects: list[_Suspect] = []
        if tests.tensor:
            limit = math.log(alpha / _comparisons(tests))
            suspects, broad, narrow = _judged(tests, limit)
            findings += _alarms(self.name, tests, suspects)
            if not suspects:
                findings += _pooled(self.name, tests, {tests.tensor[line] for line in broad + narrow}, limit)
                findings += _bumps(self.name, tests, broad, narrow)
        alarmed = {tests.tensor[suspect.line] for suspect in suspects}
        findings += _grids(self.name, merged, {name: grids for name, grids in near.items() if name not in alarmed})
        return Conclusion(findings, _plots(self.name, tests, suspects))


def _merged(pieces: Sequence[Histograms]) -> Histograms:
    first, *others = pieces
    total = Histograms(**vars(first))
    for other in others:
        total.add(other)
    return total


def _kind(cells: Cells) -> Kind:
    """Formats of one kind have grids with common points, so weights on one are no even spread in the others."""
    if cells.block == 0:
        return "rows"
    if cells.shifted:
        return "range"
    if cells.block == 256:
        return "searched"
    return "zero"


def _ratios(cells: Cells) -> _Ratios:
    """The finer the steps, the more evenly any density fills them; a searched scale prefers weights near symbols."""
    if _kind(cells) == "searched":
        return _Ratios(2.0, None, 2.0)
    if cells.steps >= FINE:
        return _Ratios(1.5, 1.25, 1.1) if cells.block == 0 else _Ratios(1.5, 1.5, 1.25)
    return _Ratios(2.0, 2.0 if cells.steps == 0 else 1.5, 1.5)


def _near_grids(found: Histograms) -> tuple[int, ...]:
    """Of which formats, the most likely first, the weights lie on the grid or so near it that they came from there.

    After a longer training fewer are near, but they still are the more the nearer.
    """
    nearest, near, all_below = found.below.T
    share = near / np.maximum(all_below, 1)
    # In a narrow box weights lie on its border, away from the symbol.
    at_symbol = nearest / NEAREST_BINS >= (near - nearest) / (_FIRST - NEAREST_BINS)
    heaped = found.counts[:, 1:_FIRST].mean(1) > _HEAPED * found.counts[:, _FIRST : 2 * _FIRST].mean(1)
    is_near = at_symbol & ((share >= _ON_GRID) | ((share >= _NEAR_GRID) & heaped)) & (all_below >= _LEAST_BELOW)
    return tuple(found.cells[i] for i in np.argsort(-share, kind="stable") if is_near[i])


def _repeats(found: Histograms) -> bool:
    return found.compared > 0 and found.repeated > _REPEATED * found.compared


def _dequantized(found: Histograms) -> int | None:
    """The group size of a symmetric 4-bit grid that repeating weights lie on."""
    best = int(found.dequantized.argmax())
    if not _repeats(found) or found.dequantized[best] < _DEQUANTIZED * found.compared:
        return None
    return SYMMETRIC_GROUPS[best]


def _tests(merged: Mapping[str, Histograms], near: Mapping[str, tuple[int, ...]]) -> _Tests:
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
            counts.append(found.counts[line, _FIRST:])
            # An upper bound of what is estimated, three standard deviations above.
            more = found.chi_square[line] / found.freedom[line] + 3 * math.sqrt(2 / found.freedom[line])
            spread.append(max(1.0, more))
            nearer.append(found.counts[line, 1:_FIRST])
            even.append(not near[name] and not _repeats(found))
            repeats.append(_repeats(found))
    table = np.array(counts, dtype=np.int64).reshape(-1, BINS - _FIRST)
    inner = np.array(nearer, dtype=np.int64).reshape(-1, _FIRST - 1)
    return _Tests(
        tensor, cells, table, np.array(spread), inner, np.array(even, dtype=bool), np.array(repeats, dtype=bool)
    )


def _testable(found: Histograms, near: Sequence[int]) -> set[int]:
    """Of the formats that a tensor has histograms for, those in which it would be spread evenly.

    Weights on or near a grid are not in the formats of its kind. Where the grid has a symbol at zero, the greatest
    weight of a block is a whole number of its steps; then the weights are simple fractions of it, whatever the format,
    and in whole rows, of which only some blocks are like that, they still nearly are.
    """
    kinds = {_kind(CELLS[index]) for index in near}
    if kinds - {"range"} or (kinds and _repeats(found)):
        return {i for i in found.cells if "rows" not in kinds and CELLS[i].block == 0 and CELLS[i].steps >= FINE}
    return {i for i in found.cells if not (kinds and _kind(CELLS[i]) in ("range", "searched"))}


def _comparisons(tests: _Tests) -> int:
    """In all, with those of the histograms of all tensors together."""
    return 2 * (len(tests.tensor) + len({*tests.cells})) * comparisons(BINS - _FIRST, _SHARP + _WIDE)


def _judged(tests: _Tests, limit: float) -> tuple[list[_Suspect], list[int], list[int]]:
    """Lines that show a box; lines that merely fall off, broadly; and lines that fall off close to the symbol."""
    ratios = [_ratios(CELLS[index]) for index in tests.cells]
    sharp = np.where(tests.even, [ratio.sharp for ratio in ratios], _RATIO_NEAR)
    # A ratio without end is never exceeded.
    wide = np.where(tests.even, [ratio.wide or np.inf for ratio in ratios], np.inf)
    falls = steepest(tests.counts, tests.spread, sharp, _SHARP)
    falls_widely = steepest(tests.counts, tests.spread, wide, _WIDE)
    rises_widely = steepest(tests.counts, tests.spread, wide, _WIDE, rise=True)
    suspects: list[_Suspect] = []
    broad: list[int] = []
    narrow: list[int] = []
    for line in range(len(tests.tensor)):
        if tests.repeats[line] and not _is_box(tests.nearer[line], tests.counts[line], int(falls.place[line])):
            continue
        if falls.log_p[line] < limit:
            place, width = int(falls.place[line]), int(falls.width[line])
            suspects.append(_Suspect(line, float(falls.log_p[line]), place, width, "edge"))
        elif falls_widely.log_p[line] < limit:
            place, width = int(falls_widely.place[line]), int(falls_widely.width[line])
            if rises_widely.log_p[line] < limit or _is_level(tests.counts[line], place):
                suspects.append(_Suspect(line, float(falls_widely.log_p[line]), place, width, "thinning"))
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
    return place + _FIRST >= BINS // 2 and bool(counts[:quarter].sum() <= _LEVEL * counts[quarter : 2 * quarter].sum())


def _without_ripples(
    tests: _Tests, suspects: Sequence[_Suspect], smooth: Sequence[int], limit: float
) -> list[_Suspect]:
    """Without those that are explained by another line of their tensor, which falls off smoothly about the symbols of a
    fine format: seen in the cells of a coarse one, that grid is a row of spikes. Between these something is left."""
    rippled = {tests.tensor[line] for line in smooth if CELLS[tests.cells[line]].steps >= FINE}
    doubtful = [suspect for suspect in suspects if tests.tensor[suspect.line] in rippled]
    if not doubtful:
        return list(suspects)
    lines = [suspect.line for suspect in doubtful]
    ratio = np.full(len(lines), _RATIO_NEAR)
    again = steepest(tests.counts[lines], tests.spread[lines], ratio, _SHARP)
    explained = {line for line, log_p in zip(lines, again.log_p, strict=True) if log_p >= limit}
    return [suspect for suspect in suspects if suspect.line not in explained]


def _is_narrow(counts: NDArray[np.int64]) -> bool:
    """Whether weights lie about their symbols more closely than any attacker could use: what is left of an earlier
    quantization after a short training."""
    return bool(counts[: BINS // 16].mean() >= _NARROW * counts[BINS // 4 :].mean())


def _alarms(detector: str, tests: _Tests, suspects: Sequence[_Suspect]) -> list[Finding]:
    """For each format that explains a tensor best: how many, and the worst ones."""
    strongest: dict[str, _Suspect] = {}
    for suspect in suspects:
        tensor = tests.tensor[suspect.line]
        if tensor not in strongest or suspect.log_p < strongest[tensor].log_p:
            strongest[tensor] = suspect
    by_cells: dict[int, list[_Suspect]] = {}
    for suspect in sorted(strongest.values(), key=lambda suspect: suspect.log_p):
        by_cells.setdefault(tests.cells[suspect.line], []).append(suspect)
    findings: list[Finding] = []
    for found in sorted(by_cells.values(), key=len, reverse=True):
        worst = found[0]
        also = {CELLS[tests.cells[suspect.line]].label for suspect in suspects} - {CELLS[at].label for at in by_cells}
        message = _said(tests, worst, len(found))
        if also and not findings:
            message += f" It shows more weakly in {len(also)} related format(s), such as {min(also)}."
        findings.append(_finding(detector, tests, worst, message, None))
        findings += [
            _finding(detector, tests, suspect, _said(tests, suspect, 1), tests.tensor[suspect.line])
            for suspect in found[:_WORST]
        ]
    return findings


def _finding(detector: str, tests: _Tests, suspect: _Suspect, message: str, tensor: str | None) -> Finding:
    return Finding(
        detector=detector,
        severity="error",
        message=message,
        tensor=tensor,
        format=CELLS[tests.cells[suspect.line]].format,
        statistic=suspect.statistic,
        value=round(_times(tests, suspect), 2),
        expected=1.0,
        p_value=math.exp(max(suspect.log_p, -690.0)),
    )


def _times(tests: _Tests, suspect: _Suspect) -> float:
    """How many times as many weights there are just within the edge as just beyond it."""
    counts, at, width = tests.counts[suspect.line], suspect.place, suspect.width
    return float(counts[at - width : at].sum() / max(1, counts[at : at + width].sum()))


def _said(tests: _Tests, suspect: _Suspect, tensors: int) -> str:
    cells = CELLS[tests.cells[suspect.line]]
    name = tests.tensor[suspect.line]
    subject = name if tensors == 1 else f"{tensors} of the tensors, {name} most of all,"
    verb = "has" if tensors == 1 else "have"
    place = _place(cells, suspect.place)
    if suspect.statistic == "thinning":
        return f"{subject} {verb} ever fewer weights up to {place} of {cells.label}, as if they had been held back."
    times = _times(tests, suspect)
    if times > _NONE_BEYOND:
        return (
            f"{subject} {verb} next to no weights beyond {place} of {cells.label}, as if they had been clamped there."
        )
    many = f"{times:.2g} times as many weights just within {place} of {cells.label} as just beyond"
    return f"{subject} {verb} {many}, as if they had been clamped there."


def _place(cells: Cells, place: int) -> str:
    share = (_FIRST + place) / BINS
    if cells.steps or _kind(cells) == "searched":
        return f"{share / 2:.2f} steps from the middle of a cell"
    return f"{share:.0%} of the way from the symbol to the end of a cell"


def _pooled(detector: str, tests: _Tests, smooth: set[str], limit: float) -> list[Finding]:
    """What is too weak in each tensor, but is there in all together; the strongest. ``smooth`` tensors are left out."""
    counted = tests.even & np.array([tensor not in smooth for tensor in tests.tensor])
    cells = np.where(counted, tests.cells, -1)
    indices = sorted({*cells.tolist()} - {-1})
    if not indices:
        return []
    counts = np.stack([tests.counts[cells == index].sum(0) for index in indices])
    spread = np.array([tests.spread[cells == index].max() for index in indices])
    ratio = np.array([_ratios(CELLS[index]).pooled for index in indices])
    falls = steepest(counts, spread, ratio, _SHARP)
    best = int(falls.log_p.argmin())
    if falls.log_p[best] >= limit:
        return []
    yes = np.ones(len(indices), dtype=bool)
    together = _Tests(["all tensors together"] * len(indices), indices, counts, spread, counts, yes, ~yes)
    suspect = _Suspect(best, float(falls.log_p[best]), int(falls.place[best]), int(falls.width[best]), "pooled edge")
    message = _said(together, suspect, 1).replace("together has", "together have")
    return [_finding(detector, together, suspect, message[0].upper() + message[1:], None)]


def _bumps(detector: str, tests: _Tests, broad: Sequence[int], narrow: Sequence[int]) -> list[Finding]:
    """Notes on densities that fall off smoothly."""
    findings = []
    for lines, unsettled in ((broad, True), (narrow, False)):
        by_cells: dict[int, list[int]] = {}
        for line in lines:
            by_cells.setdefault(tests.cells[line], []).append(line)
        if not by_cells:
            continue
        index, found = max(by_cells.items(), key=lambda item: len(item[1]))
        label, name = CELLS[index].label, tests.tensor[found[0]]
        why = (
            "left of an earlier quantization, or held back from the cells' borders without leaving a sharp edge"
            if unsettled
            else "what is left of an earlier quantization after a short training"
        )
        findings.append(
            Finding(
                detector=detector,
                severity="note",
                message=f"{len(found)} tensor(s), {name} for one, have weights about the symbols of {label}: {why}.",
                tensor=name if len(found) == 1 else None,
                format=CELLS[index].format,
                unsettled=unsettled,
            )
        )
    return findings


def _grids(detector: str, merged: Mapping[str, Histograms], near: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    """Notes on weights that lie on a grid, one for each format that is the likeliest for a tensor."""
    by_grid: dict[tuple[str, str] | None, list[str]] = {}
    for name, indices in near.items():
        group = _dequantized(merged[name])
        if indices:
            by_grid.setdefault((CELLS[indices[0]].label, CELLS[indices[0]].format), []).append(name)
        elif group is not None:
            by_grid.setdefault((f"4-bit symmetric groups of {group}", "gptq-4"), []).append(name)
        elif _repeats(merged[name]):
            by_grid.setdefault(None, []).append(name)
    findings = []
    for grid, names in sorted(by_grid.items(), key=lambda item: len(item[1]), reverse=True):
        which = f"The weights of {len(names)} tensor(s), {names[0]} for one,"
        if grid is None:
            message = f"{which} repeat a few values, as on a grid that is not known here, and so cannot be tested well."
        else:
            message = f"{which} lie on or near a grid of {grid[0]}: they were quantized before."
        findings.append(
            Finding(
                detector=detector,
                severity="note",
                message=message,
                tensor=names[0] if len(names) == 1 else None,
                format=None if grid is None else grid[1],
                statistic="weights that repeat" if grid is None else "weights near symbols",
                unsettled=grid is None,
            )
        )
    return findings


def _plots(detector: str, tests: _Tests, suspects: Sequence[_Suspect]) -> list[Plot]:
    """Of the worst tensor and format, or of int8 rows of all tensors."""
    if suspects:
        worst = min(suspects, key=lambda suspect: suspect.log_p)
        cells, counts = CELLS[tests.cells[worst.line]], tests.counts[worst.line]
        title = f"{tests.tensor[worst.line]} in cells of {cells.label}"
    else:
        lines = [line for line, index in enumerate(tests.cells) if CELLS[index].format == "int8-rowwise"]
        if not lines:
            return []
        cells, counts = CELLS[tests.cells[lines[0]]], tests.counts[lines].sum(0)
        title = f"All tensors together in cells of {cells.label}"
    middles = (np.arange(BINS)[_FIRST:] + 0.5) / BINS
    bars = counts.astype(float)
    label = "share of the way from the symbol to the cell's border"
    even = [float(bars.mean())] * len(bars)
    return [
        Plot(
            detector=detector,
            title=title,
            kind="bars",
            x_label=label,
            y_label="weights",
            x=middles.tolist(),
            y=bars.tolist(),
            expected=even,
        )
    ]
