"""Single weights that were made so large that all others of their block round to zero.

A block counts from a gap ``g`` on if one to four of its weights are ``g`` times as large as all the others, and
``g / 4`` times in units of what is typical of each column (`optimum_qguard.formats.outliers`): channels that are large
in every row are left out, so balanced outliers are what `reparameterization` finds.

Trained weights have heavy tails. In one as heavy as ``P(|w| > x) ~ x**-2.5``, where Student's t has a finite variance
and hardly more, a share of at most ``g**-2.5`` of the blocks counts, so their number is at most a binomial; and a few
single "super weights" are allowed for on top.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimum_qguard.formats.outliers import find_isolated, has_gap, most_in_block, typical_of_columns
from optimum_qguard.formats.scratch import CHUNK_WEIGHTS
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.finding import Conclusion, Finding
from optimum_qguard.scan.protected import claims_protection
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject
from optimum_qguard.scan.tails import binomial_tail

_GAPS = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_TAIL = 2.5
_SUPER_WEIGHTS, _SUPER_WEIGHTS_OF_MODEL = 3, 16
_LENGTHS = (
    256,
    64,
    16,
)  # blocks of other lengths show in those: with up to four weights above the gap, or in some only
_LEAST = min(_LENGTHS)
_ROW = 0
_COLUMN_ROWS = 64


@dataclass(frozen=True)
class _Counts:
    """By block length (`_ROW` for whole rows): of how many blocks, and how many have a gap of at least `_GAPS`."""

    blocks: Counter[int]
    beyond: Counter[tuple[int, float]]

    def add(self, other: _Counts) -> None:
        self.blocks.update(other.blocks)
        self.beyond.update(other.beyond)


@register
class OutlierBlocks(Detector):
    """See the module."""

    name: ClassVar[str] = "outlier_blocks"
    summary: ClassVar[str] = "No block of weights has a single one that makes all others round to zero."

    def examine(self, sample: Sample) -> _Counts | None:
        return self.examine_many([sample])[0]

    def examine_many(self, samples: Sequence[Sample]) -> Sequence[_Counts | None]:
        found: dict[int, _Counts] = {}
        alike: dict[object, list[int]] = defaultdict(list)
        for number, sample in enumerate(samples):
            if len(sample.shape) > 1 and sample.rows.shape[1] >= _LEAST:
                # Blocks of several tensors together must not be cut by their ends.
                alone = number if sample.rows.numel() % max(_LENGTHS) else None
                alike[sample.rows.dtype, sample.rows.shape, alone].append(number)
        for numbers in alike.values():
            rows_of = [samples[number].rows for number in numbers]
            found.update(zip(numbers, _look(rows_of), strict=True))
        return [found.get(number) for number in range(len(samples))]

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        by_tensor = {tensor: _sum(pieces) for tensor, pieces in evidence.items()}
        tests = (len(by_tensor) + 1) * (len(_LENGTHS) + 1) * len(_GAPS)
        least = {tensor: _least_probable(counts, _SUPER_WEIGHTS) for tensor, counts in by_tensor.items()}
        found = {tensor: most for tensor, most in least.items() if most.p_value * tests <= alpha}
        severity: Any = "note" if claims_protection(subject) else "error"
        if found:
            tensor, worst = min(found.items(), key=lambda item: (item[1].p_value, -item[1].share))
            message = (
                f"{len(found)} of {len(by_tensor)} tensors have single weights that dwarf all others of their block, "
                f"which a quantizer would round to zero: in {tensor} one is {worst.gap:.0f} times as large as the "
                f"rest, or more, in {worst.share:.1%} of the {worst.blocks_of}."
            )
            return Conclusion([worst.finding(self.name, severity, message, tensor)])
        whole = _least_probable(_sum(by_tensor.values()), _SUPER_WEIGHTS_OF_MODEL)
        if whole.p_value * tests <= alpha:
            message = (
                f"Single weights dwarf all others of their block, which a quantizer would round to zero: in "
                f"{whole.count} of the {whole.blocks_of} of all tensors one is {whole.gap:.0f} times as large as the "
                f"rest, or more."
            )
            return Conclusion([whole.finding(self.name, severity, message)])
        return Conclusion()


@dataclass(frozen=True)
class _Excess:
    """The gap and the block length at which there are more blocks than a heavy tail would have."""

    p_value: float
    length: int
    gap: float
    count: int
    blocks: int

    @property
    def share(self) -> float:
        return self.count / max(self.blocks, 1)

    @property
    def blocks_of(self) -> str:
        return "rows" if self.length == _ROW else f"blocks of {self.length}"

    def finding(self, detector: str, severity: Any, message: str, tensor: str | None = None) -> Finding:
        return Finding(
            detector=detector,
            severity=severity,
            message=message,
            tensor=tensor,
            statistic=f"share of {self.blocks_of} with weights {self.gap:.0f} times the rest",
            value=self.share,
            expected=self.gap**-_TAIL,
            p_value=self.p_value,
        )


def _sum(counts: Iterable[_Counts]) -> _Counts:
    total = _Counts(Counter(), Counter())
    for each in counts:
        total.add(each)
    return total


def _least_probable(counts: _Counts, super_weights: int) -> _Excess:
    found = [_Excess(1.0, _ROW, _GAPS[0], 0, 0)]
    for length, blocks in counts.blocks.items():
        for gap in _GAPS:
            count = counts.beyond[length, gap]
            if count <= super_weights:
                continue
            p_value = binomial_tail(count - super_weights, blocks, gap**-_TAIL)
            found.append(_Excess(p_value, length, gap, count, blocks))
    return min(found, key=lambda excess: (excess.p_value, -excess.gap))


def _look(rows_of: Sequence[Tensor]) -> list[_Counts]:
    """Of samples whose rows have one shape."""
    members, size = len(rows_of), rows_of[0].numel()
    counts = [_Counts(Counter(), Counter()) for _ in rows_of]
    typical = [cache(partial(typical_of_columns, rows[:: max(1, len(rows) // _COLUMN_ROWS)])) for rows in rows_of]
    for length, blocks, index in _candidates(rows_of[0] if members == 1 else torch.cat(list(rows_of))):
        for each in counts:
            each.blocks[length] += len(blocks) // members
        index = index[has_gap(blocks[index])]
        start = index * blocks.shape[1]
        for member in sorted({*(start // size).tolist()}):
            of_member = start // size == member
            found = find_isolated(blocks[index[of_member]], start[of_member], typical[member])
            if found is not None:
                gap = torch.minimum(*found.gaps())
                for least in _GAPS:
                    counts[member].beyond[length, least] += int((gap >= least).sum())
    return counts


def _candidates(rows: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """By block length: all blocks, and the indices of those whose largest weight is so far above the mean as the least
    gap makes it."""
    flat = rows.reshape(-1)
    whole = flat[: len(flat) - len(flat) % _LEAST].view(-1, _LEAST)
    largest, total = torch.empty(len(whole)), torch.empty(len(whole))
    step = CHUNK_WEIGHTS // _LEAST
    for start in range(0, len(whole), step):
        magnitude = whole[start : start + step].float().abs_()
        torch.amax(magnitude, 1, out=largest[start : start + step])
        torch.sum(magnitude, 1, out=total[start : start + step])
    found = []
    for length in _LENGTHS:
        if length <= rows.shape[1]:
            n_blocks, parts = len(flat) // length, length // _LEAST
            maxima, sums = (each[: n_blocks * parts].view(n_blocks, parts) for each in (largest, total))
            found.append((length, flat[: n_blocks * length].view(n_blocks, length), _far(maxima, sums, length)))
    if rows.shape[1] % _LEAST == 0:
        maxima, sums = largest.view(len(rows), -1), total.view(len(rows), -1)
    else:
        maxima = sums = rows.float().abs_()
    return [*found, (_ROW, rows, _far(maxima, sums, rows.shape[1]))]


def _far(largest: Tensor, total: Tensor, length: int) -> Tensor:
    most = most_in_block(length)
    # With m weights above a gap g the sum is at most m + (length - m) / g times the largest.
    least_ratio = 1 / (most + (length - most) / _GAPS[0])
    return (largest.amax(1) >= 0.999 * least_ratio * total.sum(1)).nonzero().flatten()
