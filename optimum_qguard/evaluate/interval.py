"""Confidence intervals by the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.evaluate.errors import EvaluationError


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its confidence interval; NaN where there is nothing to estimate from."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is known at the interval's level."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Tensor,
    counts: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """The mean of values, or ``sum(values) / sum(counts)``, with its percentile interval.

    For a paired comparison pass the differences.

    Args:
        values: (n,).
        counts: (n,), whether each value is one of those that are averaged over; by default all are.
        groups: (n,), integers; values of a group are drawn together, because what made them was. By default each is
            its own.
        level: of confidence.
        resamples: how often ``n`` groups are drawn with replacement.
        seed: of the draws; the same for the same number of groups, so that what is drawn is paired everywhere.

    Raises:
        EvaluationError: no values, tensors of different lengths, or a level outside 0 to 1.

    Source: Efron 1979; Cameron, Gelbach and Miller 2008 for groups.
    """
    counts = torch.ones_like(values) if counts is None else counts
    groups = torch.arange(len(values)) if groups is None else groups
    if not len(values) or not len(values) == len(counts) == len(groups) or not 0 < level < 1:
        raise EvaluationError(
            f"{len(values)} values, {len(counts)} counts and {len(groups)} groups at level {level:g}: needs as many of "
            "each, at least one, and a level between 0 and 1"
        )
    number, index = torch.unique(groups, return_inverse=True)
    sums, sizes = (
        torch.zeros(len(number), dtype=torch.float64).index_add_(0, index, each.double()) for each in (values, counts)
    )
    draws = torch.randint(len(number), (resamples, len(number)), generator=torch.Generator().manual_seed(seed))
    ratios = sums[draws].sum(1) / sizes[draws].sum(1)
    tail = (1 - level) / 2
    low, high = torch.nanquantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(sums.sum() / sizes.sum()), low, high)
