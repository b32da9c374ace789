"""Whether weights were held inside quantization cells: their positions there have an edge that training never leaves.

An attacker who wants another model after quantization than before moves weights about inside their cells, and clamps
them to boxes so that none changes its symbol. What was clamped lies on the box's border, and nothing beyond it.
See docs/scan-methods.md for the tests and what they find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from optimum_qguard.scan.box_tests import (
    FIRST,
    SHARP,
    Suspect,
    Tests,
    comparisons_in,
    dequantized_group,
    has_repeats,
    judged,
    kind_of,
    merged_pieces,
    near_grids,
    ratios_of,
    tests_of,
)
from optimum_qguard.scan.cells import CELLS, Cells
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.edges import steepest
from optimum_qguard.scan.finding import Conclusion, Finding, Plot
from optimum_qguard.scan.places import BINS
from optimum_qguard.scan.residuals import Histograms, histograms
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject

_WORST = 3
_NONE_BEYOND = 50


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
        merged = {tensor: merged_pieces(pieces) for tensor, pieces in evidence.items()}
        if not merged:
            return Conclusion(not_run="it has no matrices of at least a few thousand weights")
        near = {tensor: near_grids(found) for tensor, found in merged.items()}
        tests = tests_of(merged, near)
        findings: list[Finding] = []
        suspects: list[Suspect] = []
        if tests.tensor:
            limit = math.log(alpha / comparisons_in(tests))
            suspects, broad, narrow = judged(tests, limit)
            findings += _alarms(self.name, tests, suspects)
            if not suspects:
                findings += _pooled(self.name, tests, {tests.tensor[line] for line in broad + narrow}, limit)
                findings += _bumps(self.name, tests, broad, narrow)
        alarmed = {tests.tensor[suspect.line] for suspect in suspects}
        findings += _grids(self.name, merged, {name: grids for name, grids in near.items() if name not in alarmed})
        return Conclusion(findings, _plots(self.name, tests, suspects))


def _alarms(detector: str, tests: Tests, suspects: Sequence[Suspect]) -> list[Finding]:
    """For each format that explains a tensor best: how many, and the worst ones."""
    strongest: dict[str, Suspect] = {}
    for suspect in suspects:
        tensor = tests.tensor[suspect.line]
        if tensor not in strongest or suspect.log_p < strongest[tensor].log_p:
            strongest[tensor] = suspect
    by_cells: dict[int, list[Suspect]] = {}
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


def _finding(detector: str, tests: Tests, suspect: Suspect, message: str, tensor: str | None) -> Finding:
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


def _times(tests: Tests, suspect: Suspect) -> float:
    """How many times as many weights there are just within the edge as just beyond it."""
    counts, at, width = tests.counts[suspect.line], suspect.place, suspect.width
    return float(counts[at - width : at].sum() / max(1, counts[at : at + width].sum()))


def _said(tests: Tests, suspect: Suspect, tensors: int) -> str:
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
    share = (FIRST + place) / BINS
    if cells.steps or kind_of(cells) == "searched":
        return f"{share / 2:.2f} steps from the middle of a cell"
    return f"{share:.0%} of the way from the symbol to the end of a cell"


def _pooled(detector: str, tests: Tests, smooth: set[str], limit: float) -> list[Finding]:
    """What is too weak in each tensor, but is there in all together; the strongest. ``smooth`` tensors are left out."""
    counted = tests.even & np.array([tensor not in smooth for tensor in tests.tensor])
    cells = np.where(counted, tests.cells, -1)
    indices = sorted({*cells.tolist()} - {-1})
    if not indices:
        return []
    counts = np.stack([tests.counts[cells == index].sum(0) for index in indices])
    spread = np.array([tests.spread[cells == index].max() for index in indices])
    ratio = np.array([ratios_of(CELLS[index]).pooled for index in indices])
    falls = steepest(counts, spread, ratio, SHARP)
    best = int(falls.log_p.argmin())
    if falls.log_p[best] >= limit:
        return []
    yes = np.ones(len(indices), dtype=bool)
    together = Tests(["all tensors together"] * len(indices), indices, counts, spread, counts, yes, ~yes)
    suspect = Suspect(best, float(falls.log_p[best]), int(falls.place[best]), int(falls.width[best]), "pooled edge")
    message = _said(together, suspect, 1).replace("together has", "together have")
    return [_finding(detector, together, suspect, message[0].upper() + message[1:], None)]


def _bumps(detector: str, tests: Tests, broad: Sequence[int], narrow: Sequence[int]) -> list[Finding]:
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
        group = dequantized_group(merged[name])
        if indices:
            by_grid.setdefault((CELLS[indices[0]].label, CELLS[indices[0]].format), []).append(name)
        elif group is not None:
            by_grid.setdefault((f"4-bit symmetric groups of {group}", "gptq-4"), []).append(name)
        elif has_repeats(merged[name]):
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


def _plots(detector: str, tests: Tests, suspects: Sequence[Suspect]) -> list[Plot]:
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
    middles = (np.arange(BINS)[FIRST:] + 0.5) / BINS
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
