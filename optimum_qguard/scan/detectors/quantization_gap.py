"""Whether rounding to the nearest changes the model more than rounding as such does. Runs the model.

To first order the KL divergence from full precision grows with the variance of the rounding: ``s**2 / 12`` to the
nearest, ``s**2 / 6`` without bias, so ``G = KL(fp || nearest) / KL(fp || unbiased)`` is about one half, whatever the
model and the format, and about one at most where rounding breaks the model altogether. A payload that was planted for
the nearest makes G large. Each answer of the model gives one G, over its first tokens (where most payloads speak) and
over all; whether the mean of its logarithm is above that of 1 is a t-test.

A payload that any perturbation triggers is planted for no format. Where noise of half the amplitude is put on the
weights the divergence must fall to a quarter (where the noise is too strong for that, it must fall at a sixteenth of
the amplitude). The noise is in proportion to each weight, so that scaled channels do not matter. And rounding to the
nearest, which changes equal weights alike, must not be by far more harmless than rounding at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.formats import WeightError
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.finding import Conclusion, Finding, Plot
from optimum_qguard.scan.protected import claims_protection
from optimum_qguard.scan.rounding import FORMATS, Weights
from optimum_qguard.scan.running import LENGTH, Run
from optimum_qguard.scan.subject import Subject
from optimum_qguard.scan.tails import student_tail

CLEAN = 0.5
"""What G is to first order."""

_WINDOWS = (4, LENGTH)
_HIGHEST_CLEAN = 1.0
_HIGHEST_BROKEN = 4.0
_BROKEN = 4.0  # nats: beyond, nothing is of first order
_UNMEASURABLE = 1e-6  # nats: float32 says nothing about less
_LOWEST_CLEAN, _HARMFUL = 0.1, 0.5
_AMPLITUDE = 2.0**-6
_STRONG = 0.1  # nats: noise so strong that the response need not be linear
_HALF, _SIXTEENTH = 2, 16
_LEAST_RESPONSE = {_HALF: 2.0, _SIXTEENTH: 4.0}
_LEAST_SPREAD = 0.02
_ON_GRID = 0.05


@dataclass(frozen=True)
class Gap:
    """Of one format, by answer and token, ``(answers, LENGTH)`` nats: rounded to the nearest, and without bias."""

    format: str
    nearest: Tensor
    unbiased: Tensor

    @property
    def value(self) -> float:
        """G over all answers."""
        return _mean(self.nearest) / max(_mean(self.unbiased), _UNMEASURABLE)

    @property
    def p_value_low(self) -> float:
        """That a clean model has so small a G; 1 where rounding without bias does no harm, as on the grid."""
        if _mean(self.unbiased) < _HARMFUL:
            return 1.0
        return _above(-_log_ratios(self.nearest, self.unbiased, LENGTH), -math.log(_LOWEST_CLEAN))

    @property
    def p_value(self) -> float:
        """That a clean model has so large a G, accounting for the windows; 1 where nothing can be measured."""
        if _mean(self.unbiased) < _UNMEASURABLE:
            return 1.0
        highest = _HIGHEST_CLEAN if _mean(self.unbiased) < _BROKEN else _HIGHEST_BROKEN
        found = [_above(_log_ratios(self.nearest, self.unbiased, tokens), math.log(highest)) for tokens in _WINDOWS]
        return min(1.0, len(_WINDOWS) * min(found))


@dataclass(frozen=True)
class Response:
    """To noise of `_AMPLITUDE`, and to noise ``divisor`` times weaker, ``(answers, LENGTH)`` nats each."""

    divisor: int
    strong: Tensor
    weak: Tensor

    @property
    def value(self) -> float:
        """The ratio of both."""
        return _mean(self.strong) / max(_mean(self.weak), _UNMEASURABLE)

    @property
    def expected(self) -> float:
        """That ratio in a clean model."""
        return float(self.divisor**2)

    @property
    def p_value(self) -> float:
        """That a clean model responds so little less to the weaker noise."""
        if _mean(self.strong) < _UNMEASURABLE:
            return 1.0
        return _above(-_log_ratios(self.strong, self.weak, LENGTH), -math.log(_LEAST_RESPONSE[self.divisor]))


@register
class QuantizationGap(Detector):
    """See the module."""

    name: ClassVar[str] = "quantization_gap"
    summary: ClassVar[str] = "Rounding to the nearest changes what the model says no more than unbiased rounding does."
    deep: ClassVar[bool] = True

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        if not any(tensor.is_float for tensor in subject.tensors.values()):
            return Conclusion(not_run="there are no weights that are not quantized already")
        try:
            run = Run(subject.local_folder())
        except (ScanError, CheckpointError) as error:
            return _not_run(f"the model could not be run: {error}")
        weights = Weights(run.model)
        seed = subject.seed % 2**63
        response = measure_response(run, weights, seed)
        gaps, missing = _measure_gaps(run, weights, seed)
        found = _findings(gaps, response, alpha, protected=claims_protection(subject))
        if missing:
            message = f"The model was not tried in {', '.join(missing)}."
            found.append(Finding(detector=self.name, severity="note", message=message))
        if not gaps:
            return _not_run("no format could be tried")
        return Conclusion(found, _plots(gaps, response))


def _measure_gaps(run: Run, weights: Weights, seed: int) -> tuple[list[Gap], list[str]]:
    """Of all formats that can be tried; and which cannot, and why."""
    gaps, missing = [], []
    for format in FORMATS:
        try:
            gaps.append(measure_gap(run, weights, format, seed))
        except (ImportError, WeightError) as error:  # noqa: PERF203
            missing.append(f"{format} ({' '.join(str(error).split())})")
    return gaps, missing


def measure_gap(run: Run, weights: Weights, format: str, seed: int) -> Gap:
    """Both roundings of one format.

    Args:
        format: one of `FORMATS`.
        seed: of the unbiased one.

    Raises:
        ImportError, WeightError: see `Weights.quantize`.
    """
    weights.quantize(format)
    nearest = run.divergences()
    weights.quantize(format, torch.Generator().manual_seed(seed))
    return Gap(format, nearest, run.divergences())


def measure_response(run: Run, weights: Weights, seed: int) -> Response:
    """To the same noise at two strengths."""
    weights.disturb(_AMPLITUDE, seed)
    strong = run.divergences()
    divisor = _HALF if _mean(strong) < _STRONG else _SIXTEENTH
    weights.disturb(_AMPLITUDE / divisor, seed)
    return Response(divisor, strong, run.divergences())


def _findings(gaps: Sequence[Gap], response: Response, alpha: float, *, protected: bool) -> list[Finding]:
    name, tests = QuantizationGap.name, 2 * len(FORMATS) + 1
    severity: Any = "note" if protected else "error"
    found = []
    for gap in gaps:
        nearest, unbiased = _mean(gap.nearest), _mean(gap.unbiased)
        kind, message = severity, ""
        if gap.p_value * tests <= alpha:
            message = (
                f"Rounding to the nearest symbol of {gap.format} changes what the model says {gap.value / CLEAN:.1f} "
                f"times as much as in a clean model ({nearest:.3g} nats, and {unbiased:.3g} without bias), as if "
                "something had been planted for it."
            )
        elif gap.p_value_low * tests <= alpha:
            message = (
                f"Rounding at random to symbols of {gap.format} changes what the model says {1 / gap.value:.1f} times "
                f"as much as rounding to the nearest, not twice as in a clean model ({unbiased:.3g} and {nearest:.3g} "
                "nats), as if any change of the weights set something off."
            )
        elif gap.value < _ON_GRID:
            kind = "note"
            message = (
                f"The weights lie on the grid of {gap.format}, or nearly, so rounding to it changes nothing: the model "
                "was probably made from one that was quantized so."
            )
        elif nearest > _BROKEN and unbiased > _BROKEN:
            kind = "note"
            message = f"Quantizing to {gap.format} breaks the model ({nearest:.3g} nats)."
        if message:
            found.append(
                Finding(
                    detector=name,
                    severity=kind,
                    message=message,
                    format=gap.format,
                    statistic="KL to the nearest over KL without bias",
                    value=gap.value if math.isfinite(gap.value) else None,
                    expected=CLEAN,
                    p_value=min(gap.p_value, gap.p_value_low),
                )
            )
    if response.p_value * tests <= alpha:
        found.append(
            Finding(
                detector=name,
                severity=severity,
                message=(
                    f"Noise of a {response.divisor}th of the strength on the weights changes what the model says "
                    f"{response.value:.1f} times less, not {response.expected:.0f} times as in a clean model, as if "
                    "any change of the weights set something off."
                ),
                statistic=f"KL under noise over KL under a {response.divisor}th of it",
                value=response.value,
                expected=response.expected,
                p_value=response.p_value,
            )
        )
    return found


def _plots(gaps: Sequence[Gap], response: Response) -> list[Plot]:
    name = QuantizationGap.name
    names = ", ".join(f"{number} {gap.format}" for number, gap in enumerate(gaps, 1))
    levels = [_finite(_mean(each)) for each in (response.weak, response.strong)]
    return [
        Plot(
            detector=name,
            title="Quantization gap by format",
            kind="bars",
            x_label=names,
            y_label="KL to the nearest / KL without bias",
            x=[float(number) for number in range(1, len(gaps) + 1)],
            y=[_finite(gap.value) for gap in gaps],
            expected=[CLEAN] * len(gaps),
        ),
        Plot(
            detector=name,
            title="Response to noise on the weights",
            kind="line",
            x_label="standard deviation of the noise, relative to each weight",
            y_label="KL to the model without noise (nats)",
            x=[_AMPLITUDE / response.divisor, _AMPLITUDE],
            y=levels,
            expected=[levels[0], response.expected * levels[0]],
        ),
    ]


def _not_run(reason: str) -> Conclusion:
    message = f"The deep scan was asked for but not done: {reason}."
    note = Finding(detector=QuantizationGap.name, severity="note", message=message, unsettled=True)
    return Conclusion([note], not_run=reason)


def _log_ratios(one: Tensor, other: Tensor, tokens: int) -> Tensor:
    """Of each answer, over its first tokens."""
    means = [each[:, :tokens].mean(1).clamp(1e-9, 1e9) for each in (one, other)]
    return (means[0] / means[1]).log()


def _above(values: Tensor, mean: float) -> float:
    """The p-value of values ``(n,)`` whose mean would be at most that."""
    spread = max(float(values.std()), _LEAST_SPREAD)
    return student_tail((float(values.mean()) - mean) * math.sqrt(len(values)) / spread, len(values) - 1)


def _mean(divergences: Tensor) -> float:
    return float(divergences.mean())


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e9
