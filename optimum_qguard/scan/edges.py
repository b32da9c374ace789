"""Whether a histogram falls or rises more steeply than a smooth one can.

Two neighbouring windows of equal width are compared. The null hypothesis is not that their densities are equal, but
that one is at most ``ratio`` times the other, which is what a density of weights does within a part of a cell. Given
how many weights the two hold together, the number in the outer one is then binomial or more, and the probability of so
few is at most exp(-n · KL(share ‖ 1 / (1 + ratio))) (Chernoff), where n is the number of weights divided by how much
more than independent ones they vary. So no test says "significant" more often than it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Steepest:
    """The least probable of many comparisons, for each of ``n`` histograms.

    Attributes:
        log_p: ``(n,)`` of its probability (at most 0).
        place: ``(n,)`` int64, the bin with which the outer window begins.
        width: ``(n,)`` int64, of a window, in bins.
    """

    log_p: Floats
    place: NDArray[np.int64]
    width: NDArray[np.int64]


def steepest(counts: Counts, spread: Floats, ratio: Floats, widths: Sequence[int], *, rise: bool = False) -> Steepest:
    """Where each histogram falls most steeply, outwards.

    Args:
        counts: ``(n, bins)``.
        spread: ``(n,)``, at least 1: variance of the counts relative to that of independent weights.
        ratio: ``(n,)``, of two neighbouring windows' densities, up to which there is nothing to say.
        widths: of windows, in bins.
        rise: look for where it rises instead.
    """
    n = len(counts)
    log_p, place, chosen = np.zeros(n), np.zeros(n, dtype=np.int64), np.full(n, widths[0], dtype=np.int64)
    every = np.arange(n)
    for width, places, inner, outer in _windows(counts, widths):
        if rise:
            inner, outer = outer, inner
        found = _log_p(inner, outer, spread[:, None], ratio[:, None])
        best = found.argmin(1)
        value = found[every, best]
        better = value < log_p
        log_p = np.where(better, value, log_p)
        place, chosen = np.where(better, places[best], place), np.where(better, width, chosen)
    return Steepest(log_p, place, chosen)


def comparisons(bins: int, widths: Sequence[int]) -> int:
    """How many windows `steepest` compares in one histogram, in one direction."""
    return sum(len(places) for _, places, _, _ in _windows(np.zeros((1, bins), dtype=np.int64), widths))


def _windows(counts: Counts, widths: Sequence[int]) -> Iterator[tuple[int, NDArray[np.int64], Counts, Counts]]:
    below = np.concatenate([np.zeros((len(counts), 1), dtype=np.int64), counts.cumsum(1)], axis=1)
    for width in widths:
        # From the border inwards, so that the outermost window is one of them.
        places = np.arange(counts.shape[1] - width, width - 1, -max(1, width // 4))
        middle = below[:, places]
        yield width, places, middle - below[:, places - width], below[:, places + width] - middle


def _log_p(inner: Counts, outer: Counts, spread: Floats, ratio: Floats) -> Floats:
    both = inner + outer
    log_p = np.zeros(both.shape)
    expected = np.broadcast_to(1 / (1 + ratio), both.shape)
    unusual = outer < expected * both
    share, expected = outer[unusual] / both[unusual], expected[unusual]
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(share > 0, share * np.log(share / expected), 0) + (1 - share) * np.log(
            (1 - share) / (1 - expected)
        )
    log_p[unusual] = -both[unusual] / np.broadcast_to(spread, both.shape)[unusual] * divergence
    return log_p
