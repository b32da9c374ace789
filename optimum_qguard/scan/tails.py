"""Tails of distributions: how probable a value so large is."""

from __future__ import annotations

import math


def binomial_tail(count: int, trials: int, share: float) -> float:
    """An upper bound of the probability that at least ``count`` of ``trials`` succeed, each with probability ``share``.

    Chernoff's, ``exp(-trials * KL(count / trials || share))``; Hoeffding 1963, theorem 1.
    """
    if count <= 0 or share >= 1 or count <= trials * share:
        return 1.0
    if share <= 0:
        return 0.0
    rate = count / trials
    divergence = rate * math.log(rate / share)
    if rate < 1:
        divergence += (1 - rate) * math.log((1 - rate) / (1 - share))
    return math.exp(-trials * divergence)


def student_tail(t: float, freedom: int) -> float:
    """The probability that Student's t with so many degrees of freedom is above ``t``.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, by which the probability between ``-t`` and ``t`` is
    known; right to about 1e-15, absolute.
    """
    if t < 0:
        return 1 - student_tail(-t, freedom)
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    if freedom == 1:
        total = 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= (step - 1) / step * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, (1 - inside) / 2)
