"""How a checkpoint differs from the one that it claims to be a fine-tune of.

A fine-tune that was made to keep what a quantizer makes of its base moves weights inside their cells only. Small
changes leave most symbols as they are anyway, so what is counted is compared with the mirrored change: base minus
difference, as far away from the same weights, but not planned for their cells. Of a fine-tune that knows nothing of
cells, both change as many symbols.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.formats import Format, WeightError, get_format
from optimum_qguard.scan.finding import Finding, Severity, listed
from optimum_qguard.scan.sample import read_runs, sampled_runs
from optimum_qguard.scan.subject import StoredTensor, Subject

FORMATS = ("int8-rowwise", "nf4", "fp4", "gguf-q8_0", "gguf-q4_0")
"""Whose cells are looked at: those of other formats with the same blocks are nearly the same."""

FEW = 1 / 4
"""Of the symbols that the mirrored change changes; a change that changes fewer was planned for the cells."""

_ENOUGH = 100
_ON_GRID = 0.02
_MOST_ON_GRID = 0.9
_finding = partial(Finding, detector="provenance")


@dataclass
class _Change:
    """Of one tensor's sampled weights.

    Attributes:
        weights, changed: how many there are, and how many are not what they were.
        squares, base_squares: sums, of the change and of the base's weights.
        kept, crossed, mirrored: by format, how many of the changed weights keep their symbol, how many do not, and how
            many would not under the mirrored change.
        on_grid: by format, how many of the changed weights are their symbol's value, as far as their dtype can hold it.
    """

    weights: int = 0
    changed: int = 0
    squares: float = 0.0
    base_squares: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    crossed: dict[str, int] = field(default_factory=dict)
    mirrored: dict[str, int] = field(default_factory=dict)
    on_grid: dict[str, int] = field(default_factory=dict)


def check_ancestry(subject: Subject, alpha: float) -> Iterator[Finding]:
    """What changed against ``subject.base``, and how.

    Args:
        alpha: how often a checkpoint whose changes know nothing of cells may be called planned.
    """
    base = subject.base
    if base is None:
        return
    name = base.repository.name
    for problem in base.problems.values():
        yield _finding(severity="note", message=f"The base {name} cannot be compared with: {problem}.", unsettled=True)
    # By their ids: files may have tensors of one name, and each is compared.
    own = {id: t for id, t in subject.tensors.items() if t.is_float and t.info.n_elements}
    other = {t.info.name: t for t in base.tensors.values() if t.is_float and t.info.n_elements}
    pairs = {
        id: (tensor, old)
        for id, tensor in own.items()
        if (old := other.get(tensor.info.name)) is not None
        and (tensor.info.shape, tensor.transposed) == (old.info.shape, old.transposed)
    }
    strange = [id for id in own if id not in pairs]
    if strange or not pairs:
        related = len(pairs) >= len(own) / 2 and pairs
        message = (
            f"{len(strange):,} of {len(own):,} tensors have another shape in {name} or are not in it: {listed(strange)}"
            if related
            else f"It is no fine-tune of {name}: {len(pairs):,} of {len(own):,} tensors have the same names and shapes"
        )
        yield _finding(severity="note" if related else "warning", message=f"{message}.", unsettled=not pairs)
    changes: dict[str, _Change] = {}
    for tensor, (new, old) in pairs.items():
        try:
            changes[tensor] = _compare(subject, base, new, old)
        except (CheckpointError, WeightError) as error:  # noqa: PERF203  one broken tensor is no reason to stop
            message = f"{tensor} could not be compared with {name}: {error}"
            yield _finding(severity="note", tensor=new.id, message=message, unsettled=True)
    if changes:
        yield _summary(name, changes)
        for format in FORMATS:
            yield from _planned(format, name, changes, alpha / len(FORMATS))


def _compare(subject: Subject, base: Subject, new: StoredTensor, old: StoredTensor) -> _Change:
    remote = None in (subject.repository.local_folder, base.repository.local_folder)
    chosen = sampled_runs(new, subject.seed, remote=remote)
    now = read_runs(subject.repository, new, chosen)
    before = read_runs(base.repository, old, chosen)
    if now.dtype.itemsize < before.dtype.itemsize:
        before = before.to(now.dtype)  # a change that rounding to the narrower dtype makes is none
    precision = torch.finfo(now.dtype).eps
    now, before = now.float(), before.float()
    change = now - before
    moved = change != 0
    found = _Change(
        weights=now.numel(),
        changed=int(moved.sum()),
        squares=float(torch.linalg.vector_norm(change)) ** 2,
        base_squares=float(torch.linalg.vector_norm(before)) ** 2,
    )
    if not math.isfinite(found.squares + found.base_squares):
        raise WeightError("it has weights that are NaN, infinite or too large")
    if found.changed and len(new.info.shape) > 1:
        for name in FORMATS:
            _count(found, name, get_format(name), before, change, precision)
    return found


def _count(found: _Change, name: str, format: Format, before: Tensor, change: Tensor, precision: float) -> None:
    try:
        old, new, mirrored = (format.quantize(before + sign * change) for sign in (0, 1, -1))
    except WeightError:  # rows that the format's blocks do not fit
        return
    moved = change != 0
    crossed = old.codes != new.codes
    found.crossed[name] = int((crossed & moved).sum())
    found.kept[name] = found.changed - found.crossed[name]
    found.mirrored[name] = int(((old.codes != mirrored.codes) & moved).sum())
    middle = old.symbols()
    close = _ON_GRID * 2 * old.half_widths() + precision * middle.abs()
    found.on_grid[name] = int((((before + change - middle).abs() <= close) & moved).sum())


def _summary(base: str, changes: dict[str, _Change]) -> Finding:
    weights = sum(change.weights for change in changes.values())
    changed = sum(change.changed for change in changes.values())
    same = [tensor for tensor, change in changes.items() if not change.changed]
    norm = math.sqrt(
        sum(change.squares for change in changes.values())
        / max(sum(change.base_squares for change in changes.values()), 1e-300)
    )
    if not changed:
        message = f"All weights that were compared are those of {base}."
    else:
        kept: dict[str, int] = defaultdict(int)
        total: dict[str, int] = defaultdict(int)
        for change in changes.values():
            for format, count in change.kept.items():
                kept[format] += count
                total[format] += change.changed
        shares = ", ".join(f"{kept[format] / total[format]:.1%} for {format}" for format in FORMATS if total[format])
        inside = [
            t for t, change in changes.items() if change.changed and change.crossed and not any(change.crossed.values())
        ]
        message = (
            f"{changed / weights:.1%} of the weights that were compared with {base} changed, by {norm:.2g} of their "
            f"norm, in {len(changes) - len(same):,} of {len(changes):,} tensors; of those that changed, a quantizer "
            f"gives the same symbol as before to {shares or 'none that was looked at'}; {len(inside):,} tensors "
            "changed only inside the cells of every format."
        )
    return _finding(
        severity="note", message=message, statistic="share of weights changed", value=changed / max(weights, 1)
    )


def _planned(format: str, base: str, changes: dict[str, _Change], alpha: float) -> Iterator[Finding]:
    """Tensors whose change avoids changing symbols, in one finding."""
    counted = {tensor: change for tensor, change in changes.items() if change.mirrored.get(format, 0) >= _ENOUGH}
    planned: list[str] = []
    rounded: list[str] = []
    for tensor, change in counted.items():
        crossed, mirrored = change.crossed[format], change.mirrored[format]
        if crossed < FEW * mirrored and _tail(crossed, mirrored) < alpha / len(counted):
            (rounded if change.on_grid[format] > _MOST_ON_GRID * change.changed else planned).append(tensor)
    kinds: tuple[tuple[list[str], Severity, str], ...] = (
        (planned, "warning", "as if they had been planned for what the quantizer does"),
        (rounded, "note", "for they were rounded to the middle of the cells"),
    )
    for tensors, severity, what in kinds:
        if tensors:
            crossed = sum(changes[tensor].crossed[format] for tensor in tensors)
            mirrored = sum(changes[tensor].mirrored[format] for tensor in tensors)
            message = (
                f"The changes of {len(tensors):,} tensors against {base} stay inside the cells of {format}, {what}: "
                f"they change {crossed:,} symbols, with the opposite sign they would {mirrored:,}: {listed(tensors)}."
            )
            yield _finding(
                severity=severity,
                message=message,
                format=format,
                statistic="symbols changed",
                value=crossed,
                expected=mirrored,
                p_value=min(_tail(changes[t].crossed[format], changes[t].mirrored[format]) for t in tensors),
            )


def _tail(crossed: int, mirrored: int) -> float:
    """At least the probability of so few heads among that many tosses of a fair coin (Chernoff's bound)."""
    total = crossed + mirrored
    share = crossed / total
    entropy = -sum(part * math.log(part) for part in (share, 1 - share) if part)
    return math.exp(-total * (math.log(2) - entropy))
