"""Bootstrap intervals: against formulas, and how often they hold the truth."""

import math

import pytest
import torch

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.interval import Interval, bootstrap


def test_estimate_and_width_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = bootstrap(values)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    assert found.estimate == pytest.approx(float(values.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    narrower = bootstrap(values, level=0.5)
    assert (narrower.high - narrower.low) / 2 == pytest.approx(half * 0.6745 / 1.96, rel=0.06)


def test_a_ratio_is_over_what_counts() -> None:
    counts = torch.tensor([True, True, False, True, False])
    found = bootstrap(counts & torch.tensor([True, False, True, True, True]), counts)
    assert found.estimate == pytest.approx(2 / 3)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert math.isnan(bootstrap(torch.zeros(3), torch.zeros(3)).estimate)


@pytest.mark.parametrize(("size", "within"), [(1, False), (4, True)])
def test_it_holds_the_truth_as_often_as_it_says(size: int, within: bool) -> None:
    """Values of a group share most of their noise; taken for independent, they seem to say more than they do."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(200) // 4
    held = 0
    for _ in range(200):
        shared = torch.randn(50, generator=generator).repeat_interleave(4)
        values = 0.7 + shared + 0.3 * torch.randn(200, generator=generator)
        found = bootstrap(values, groups=groups if size == 4 else None, resamples=400)
        held += found.low < 0.7 < found.high
    assert (0.9 < held / 200 < 0.99) is within


def test_the_sign() -> None:
    assert bootstrap(torch.tensor([1.0, 2.0, 3.0])).excludes_zero
    assert Interval(-1, -2, -0.5).excludes_zero
    assert not Interval(0.1, -0.2, 0.5).excludes_zero


def test_bad_input() -> None:
    for values, options in [
        (torch.zeros(0), {}),
        (torch.zeros(3), {"counts": torch.ones(2)}),
        (torch.zeros(3), {"groups": torch.zeros(4)}),
        (torch.zeros(3), {"level": 1.0}),
    ]:
        with pytest.raises(EvaluationError, match="as many of each"):
            bootstrap(values, **options)
