"""The widths that predict the least divergence within a budget of bits.

A multiple-choice knapsack, solved exactly: each group of layers takes one width, ``Σ bits · weights`` stays within the
budget, and the sum of the groups' divergences is least. That divergences add up holds for small ones.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optimum_qguard.precision.bitmap import MAXIMUM, MINIMUM, WIDTHS, BitMap
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.sensitivity import Sensitivity

# Of the objective, relative to the uniform map's: the solver stops within an absolute 1e-6.
_SCALE = 1e3
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Allocation:
    """Widths for a budget.

    Attributes:
        widths: by group.
        average_bits: what they come to, at most what was asked for.
        predicted: the sum of the groups' divergences, nats per token.
        bitmap: the widths as a bit map of layers.
    """

    widths: dict[str, int]
    average_bits: float
    predicted: float
    bitmap: BitMap


def allocate(sensitivity: Sensitivity, average_bits: float) -> Allocation:
    """The widths with the least predicted divergence whose average over the weights is at most ``average_bits``.

    Args:
        sensitivity: from `measure_sensitivity`.
        average_bits: 2 to 8.

    Raises:
        PrecisionError: a budget out of range, no groups, or scipy is not installed.
    """
    check_budget(average_bits)
    if not sensitivity.groups:
        raise PrecisionError("the sensitivity has no groups to give widths to")
    widths = _solve(sensitivity, average_bits)
    found = {group.name: width for group, width in zip(sensitivity.groups, widths, strict=True)}
    return Allocation(
        widths=found,
        average_bits=sensitivity.average_bits(found),
        predicted=sensitivity.predict(found),
        bitmap=BitMap({module: found[group.name] for group in sensitivity.groups for module in group.modules}),
    )


def check_budget(average_bits: float) -> None:
    """Raise `PrecisionError` unless it is between the least and the greatest width."""
    if not (isinstance(average_bits, (int, float)) and MINIMUM <= average_bits <= MAXIMUM):
        raise PrecisionError(
            f"the budget is {average_bits!r} bits; an average width is between {MINIMUM} and {MAXIMUM}"
        )


def _solve(sensitivity: Sensitivity, average_bits: float) -> list[int]:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise PrecisionError(
            "the package scipy is not installed; install it with: pip install 'optimum-qguard[precision]'"
        ) from error
    curves = [group.curve() for group in sensitivity.groups]
    n_groups, n_widths = len(curves), len(WIDTHS)
    uniform = math.fsum(curve[min(MAXIMUM, math.floor(average_bits))] for curve in curves)
    cost = np.array([curve[width] for curve in curves for width in WIDTHS]) * (_SCALE / uniform)
    # What is spent goes in whole units. Half a unit over the budget keeps rounding errors from costing one, and the
    # solver may exceed it by its tolerance.
    units = sensitivity.weights // math.gcd(*(group.weights for group in sensitivity.groups))
    budget = max((math.floor(average_bits * units + 1e-9) + 0.5) / units - _TOLERANCE, MINIMUM)
    shares = [group.weights / sensitivity.weights for group in sensitivity.groups]
    spent = np.array([[share * width for share in shares for width in WIDTHS]])
    one_each = np.kron(np.eye(n_groups), np.ones(n_widths))
    with _quiet():
        found = milp(
            cost,
            integrality=np.ones_like(cost),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, ub=budget)],
            options={"mip_rel_gap": 0},
        )
    if not found.success:
        raise PrecisionError(f"no widths found for {average_bits:g} bits: {found.message}")
    return [WIDTHS[int(row.argmax())] for row in found.x.reshape(n_groups, n_widths)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the solver's C++ prints for its developers off the process's standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
