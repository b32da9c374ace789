"""Weight noise: ``W + N(0, sigma**2)`` on all linear weights, with the ``sigma`` that multiplies perplexity by a wanted
ratio.

For small noise the loss grows with its variance, so ``log r(sigma)`` is about ``a sigma**2 + b``. A few measurements
fit ``a`` and ``b``, ``sigma = sqrt((log r - b) / a)`` is measured in turn, and so on until the ratio is met. The noise
is the same for every ``sigma`` but for its size, so that the measurements lie on one smooth curve.

Source: the weight-noise attack of the paper on anchor-guided repair (METHODS: ``log r`` against ``sigma**2``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.attacks.errors import AttackError

_FIRST = 0.05
_ROUNDS = 16
_LARGEST_STEP = 4.0
_NEAREST = 3


@dataclass(frozen=True)
class WeightNoise:
    """What `add_weight_noise` did.

    Attributes:
        sigma: standard deviation of the noise, in the weights' units.
        ratio: measured perplexity over that of the clean model, whose perplexity is ``clean``.
        seed: of the noise.
        tensors: names of the weights that have it.
        measured: every ``(sigma, ratio)`` on the way.
    """

    sigma: float
    ratio: float
    clean: float
    seed: int
    tensors: tuple[str, ...]
    measured: tuple[tuple[float, float], ...]


def add_weight_noise(
    model: nn.Module,
    perplexity: Callable[[Any], float],
    ratio: float,
    *,
    seed: int = 0,
    tolerance: float = 0.01,
    rounds: int = _ROUNDS,
) -> WeightNoise:
    """Add noise to the weights of all linear layers but the output head, in place.

    Args:
        model: a full-precision model.
        perplexity: measures it.
        ratio: wanted perplexity, as a multiple of the clean model's; greater than 1.
        seed: of the noise.
        tolerance: how far the ratio that is reached may be from the wanted one, relative to it.
        rounds: how many noisy models may be measured.

    Raises:
        AttackError: a ratio that noise cannot reach, no linear layers, or no convergence; the model is as it was.
    """
    if not (math.isfinite(ratio) and ratio > 1):
        raise AttackError(f"ratio is {ratio:g}; noise makes perplexity larger, so it is greater than 1")
    weights = linear_weights(model)
    if not weights:
        raise AttackError("the model has no linear layers to put noise on")
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    measured: dict[float, float] = {}
    found = False
    try:
        clean = perplexity(model)
        if not (math.isfinite(clean) and clean > 0):
            raise AttackError(f"the clean model's perplexity is {clean:g}, so no ratio to it means anything")
        sigma = _FIRST * float(torch.stack([weight.float().std() for weight in originals.values()]).median())
        for _ in range(rounds):
            for name, weight in weights.items():
                weight.data.copy_(noisy(originals[name], sigma, seed, name))
            measured[sigma] = perplexity(model) / clean
            if abs(measured[sigma] / ratio - 1) <= tolerance:
                found = True
                return WeightNoise(sigma, measured[sigma], clean, seed, tuple(weights), tuple(measured.items()))
            sigma = next_sigma(measured, ratio)
    finally:
        if not found:
            for name, weight in weights.items():
                weight.data.copy_(originals[name])
    rates = ", ".join(f"{each:.3g}: {reached:.4g}" for each, reached in sorted(measured.items()))
    raise AttackError(
        f"no sigma found for a perplexity ratio of {ratio:g} within {tolerance:.1%} in {rounds} rounds; "
        f"ratios by sigma: {rates}"
    )


def noisy(weight: Tensor, sigma: float, seed: int, name: str) -> Tensor:
    """``weight + N(0, sigma**2)`` in the weight's dtype; the normal numbers depend on seed and name only."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    normal = torch.randn(weight.shape, generator=generator).to(weight.device)
    return (weight.float() + sigma * normal).to(weight.dtype)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all linear layers (``Conv1D`` included) but the output head, by name."""
    from transformers.pytorch_utils import Conv1D

    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }


def next_sigma(measured: dict[float, float], ratio: float) -> float:
    """Where to measure next: the solution of ``log r = a sigma**2 + b`` fitted to the measurements nearest to the
    wanted ratio, kept between those that enclose it."""
    wanted = math.log(ratio)
    usable = {sigma: math.log(reached) for sigma, reached in measured.items() if 0 < reached < math.inf}
    below = max((sigma for sigma, log in usable.items() if log < wanted), default=0.0)
    above = min((sigma for sigma in measured if usable.get(sigma, math.inf) > wanted), default=math.inf)
    if above < below:  # not monotonous: the curve is not smooth at this scale
        below, above = above, below
    nearest = sorted(usable.items(), key=lambda item: abs(item[1] - wanted))[:_NEAREST]
    guess = _solve(nearest, wanted)
    low = below or above / _LARGEST_STEP
    high = above if math.isfinite(above) else below * _LARGEST_STEP
    if not low < guess < high or guess in measured:
        guess = math.sqrt(low * high)
    return guess


def _solve(points: list[tuple[float, float]], wanted: float) -> float:
    """``sqrt((wanted - b) / a)`` of the least-squares fit of ``(sigma, log r)``; NaN where it has none."""
    if not points:
        return math.nan
    squares, logs = [sigma * sigma for sigma, _ in points], [log for _, log in points]
    if len(points) == 1:
        slope, offset = logs[0] / squares[0], 0.0
    else:
        mean, mean_log = math.fsum(squares) / len(points), math.fsum(logs) / len(points)
        spread = math.fsum((square - mean) ** 2 for square in squares)
        covariance = math.fsum((s - mean) * (log - mean_log) for s, log in zip(squares, logs, strict=True))
        slope = covariance / spread
        offset = mean_log - slope * mean
    return math.sqrt((wanted - offset) / slope) if slope > 0 and wanted > offset else math.nan
