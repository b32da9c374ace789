"""The formulas are what they claim."""

import math

import pytest

from optimum_qguard.scan.tails import binomial_tail, student_tail


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19])
@pytest.mark.parametrize("t", [0.0, 0.7, 2.5, 6.0])
def test_student_tail_is_the_integral_of_the_density(freedom: int, t: float) -> None:
    norm = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    steps = 20_000
    width = t / steps
    inside = sum(
        norm * (1 + ((index + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) * width for index in range(steps)
    )
    assert student_tail(t, freedom) == pytest.approx(0.5 - inside, abs=1e-9)
    assert student_tail(-t, freedom) == pytest.approx(0.5 + inside, abs=1e-9)


@pytest.mark.parametrize(
    ("count", "trials", "share"), [(5, 100, 0.01), (12, 1000, 0.002), (30, 30, 0.3), (4, 300, 0.4)]
)
def test_binomial_tail_bounds_the_exact_one(count: int, trials: int, share: float) -> None:
    exact = sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(count, trials + 1))
    bound = binomial_tail(count, trials, share)
    assert exact <= bound * (1 + 1e-9)
    assert bound == 1 or bound < 20 * exact


def test_binomial_tail_at_its_ends() -> None:
    assert binomial_tail(0, 10, 0.1) == binomial_tail(-3, 10, 0.1) == binomial_tail(3, 10, 1.0) == 1
    assert binomial_tail(1, 10, 0.0) == 0
