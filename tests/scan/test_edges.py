"""The tests on histograms are what their docstrings claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optimum_qguard.scan.edges import comparisons, steepest


def test_a_probability_is_no_smaller_than_the_binomial_one() -> None:
    inner, outer, ratio = 100, 20, 1.5
    counts = np.array([[inner, outer]])
    found = steepest(counts, np.ones(1), np.full(1, ratio), [1])
    share = 1 / (1 + ratio)
    exact = sum(math.comb(120, k) * share**k * (1 - share) ** (120 - k) for k in range(outer + 1))
    assert math.log(exact) < found.log_p[0] < math.log(exact) + 5
    assert (found.place[0], found.width[0]) == (1, 1)


def test_where_the_densities_ratio_is_allowed_nothing_is_unusual() -> None:
    found = steepest(np.array([[150, 100], [100, 100], [0, 0]]), np.ones(3), np.full(3, 1.5), [1])
    assert found.log_p.tolist() == [0, 0, 0]


def test_weights_that_vary_more_say_less() -> None:
    counts = np.array([[100, 20], [100, 20]])
    alone, together = steepest(counts, np.array([1.0, 4.0]), np.full(2, 1.5), [1]).log_p
    assert together == pytest.approx(alone / 4)


def test_rises_are_falls_the_other_way_round() -> None:
    counts = np.random.default_rng(0).poisson(50, (20, 32))
    ones = np.ones(20)
    falls = steepest(counts, ones, ones, [1, 2])
    rises = steepest(counts[:, ::-1], ones, ones, [1, 2], rise=True)
    assert falls.log_p == pytest.approx(rises.log_p)


def test_an_edge_is_found_where_it_is() -> None:
    counts = np.full((1, 64), 100)
    counts[0, 40:] = 3
    found = steepest(counts, np.ones(1), np.full(1, 2.0), [1, 2, 4])
    assert (found.place[0], found.width[0]) == (40, 4)


def test_false_alarms_are_no_more_frequent_than_said() -> None:
    """Of even histograms, tested against evenness itself."""
    counts = np.random.default_rng(1).multinomial(5000, [1 / 64] * 64, size=4000)
    ones = np.ones(len(counts))
    found = steepest(counts, ones, ones, [1, 2, 4, 16])
    tested = comparisons(64, [1, 2, 4, 16])
    assert 0 < (found.log_p < math.log(0.05 / tested)).mean() < 0.05
