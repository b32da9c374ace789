"""Whether rounding to the nearest changes the model more than errors of the same size as such do. Runs the model.

An honest model's rounding errors have no direction. So errors of the same size, each with a sign drawn at random,
change what the model says about as much, and ``G = KL(fp || nearest) / KL(fp || random signs)`` is about one, whatever
the model and the format; a payload that was planted for the nearest makes it large. (Unbiased rounding has twice the
variance of random signs, which gives one half to first order; but at four bits nothing is of first order.)

Each answer of the model gives one G, over its first tokens (where most payloads speak) and over all. Whether the mean
of its logarithm is above that of 1.4 is a t-test, whose variance is that of the answers and that of the draw: how much
the mean differs from one draw of signs to the next, over all formats.

A payload that any perturbation triggers is planted for no format. Where noise of half the amplitude is put on the
weights the divergence must fall to a quarter (where the noise is too strong for that, it must fall at a sixteenth of
the amplitude). The noise is in proportion to each weight, so that scaled channels do not matter. And rounding to the
nearest, which changes equal weights alike, must not be by far more harmless than errors with random signs.
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

DRAWS = 3
"""Of random signs, for each format."""

CLEAN = 1.0
"""What G is."""

_WINDOWS = (4, LENGTH)
_HIGHEST_CLEAN, _LOWEST_CLEAN = 1.4, 0.1
_HIGHEST_BROKEN = 4.0
_BROKEN = 4.0  # nats: beyond, what an error of that size does depends on its kind
_HARMFUL = 0.5  # nats
_UNMEASURABLE = 1e-6  # nats: float32 says nothing about less
_AMPLITUDE = 2.0**-6
_STRONG = 0.1  # nats: noise so strong that the response need not be linear
_HALF, _SIXTEENTH = 2, 16
_LEAST_RESPONSE = {_HALF: 2.0, _SIXTEENTH: 4.0}
_LEAST_SPREAD = 0.02
_DOUBTFUL = 1e-2  # p-value of what leaves it open whether a model is clean


@dataclass(frozen=True)
class Gap:
    """Of one format, in nats.

    Attributes:
        nearest: ``(answers, LENGTH)``, rounded to the nearest.
        signs: ``(DRAWS, answers, LENGTH)``, with errors of the same size and random signs.
    """

    format: str
    nearest: Tensor
    signs: Tensor

    @property
    def value(self) -> float:
        """G over all answers."""
        return _mean(self.nearest) / max(_mean(self.signs), _UNMEASURABLE)

    @property
    def is_measurable(self) -> bool:
        """Whether rounding changes anything; it does not on the grid, or where nothing depends on the weights."""
        return _mean(self.signs) >= _UNMEASURABLE

    def log_ratios(self, tokens: int) -> Tensor:
        """``(DRAWS, answers)`` logarithms of G over the answers' first tokens."""
        return _log_ratios(self.nearest, self.signs, tokens)

    def p_values(self, spreads: Mapping[int, float], freedom: int) -> tuple[float, float]:
        """That a clean model has so large a G, accounting for the windows, and so small a one.

        Args:
            spreads: of the mean logarithm, from draw to draw, by window.
            freedom: how many degrees of freedom that was estimated with.
        """
        if not self.is_measurable:
            return 1.0, 1.0
        highest = _HIGHEST_CLEAN if _mean(self.signs) < _BROKEN else _HIGHEST_BROKEN
        large = [
            _above(self.log_ratios(tokens).mean(0), math.log(highest), spreads[tokens], freedom) for tokens in _WINDOWS
        ]
        small = 1.0
        if _mean(self.signs) > _HARMFUL:
            ratios = -self.log_ratios(LENGTH).mean(0)
            small = _above(ratios, -math.log(_LOWEST_CLEAN), spreads[LENGTH], freedom)
        return min(1.0, len(_WINDOWS) * min(large)), small


def spreads_of(gaps: Sequence[Gap]) -> tuple[dict[int, float], int]:
    """By window, the standard deviation from draw to draw of the mean logarithm of G, and its degrees of freedom."""
    measured = [gap for gap in gaps if gap.is_measurable]
    freedom = max(1, len(measured) * (DRAWS - 1))
    found = {}
    for tokens in _WINDOWS:
        variances = [float(gap.log_ratios(tokens).mean(1).var()) for gap in measured]
        found[tokens] = math.sqrt(sum(variances) / max(1, len(measured)))
    return found, freedom


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
        # The same noise at both strengths, so there is no other draw to account for.
        return _above(-_log_ratios(self.strong, self.weak, LENGTH), -math.log(_LEAST_RESPONSE[self.divisor]))


@register
class QuantizationGap(Detector):
    """See the module."""

    name: ClassVar[str] = "quantization_gap"
    summary: ClassVar[str] = (
        "Rounding to the nearest changes what the model says no more than errors of the same size do."
    )
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
    """One format, rounded to the nearest and with random signs.

    Args:
        format: one of `FORMATS`.
        seed: of the signs.

    Raises:
        ImportError, WeightError: see `Weights.quantize`.
    """
    weights.quantize(format)
    nearest = run.divergences()
    generator = torch.Generator().manual_seed(seed)
    signs = []
    for _ in range(DRAWS):
        weights.quantize(format, generator)
        signs.append(run.divergences())
    return Gap(format, nearest, torch.stack(signs))


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
    spreads, freedom = spreads_of(gaps)
    for gap in gaps:
        nearest, signs = _mean(gap.nearest), _mean(gap.signs)
        large, small = gap.p_values(spreads, freedom)
        kind, message, unsettled = severity, "", False
        if large * tests <= alpha:
            message = (
                f"Rounding to the nearest symbol of {gap.format} changes what the model says {gap.value:.1f} times as "
                f"much as errors of the same size and no direction do ({nearest:.3g} and {signs:.3g} nats), as if "
                "something had been planted for it."
            )
        elif large * tests <= _DOUBTFUL:
            kind, unsettled = "note", not protected
            message = (
                f"Rounding to the nearest symbol of {gap.format} changes what the model says {gap.value:.1f} times as "
                f"much as errors of the same size and no direction do ({nearest:.3g} and {signs:.3g} nats): too much "
                "to call the model clean, too little to be sure."
            )
        elif small * tests <= alpha:
            message = (
                f"Errors as large as those of rounding to {gap.format} change what the model says {1 / gap.value:.0f} "
                f"times as much as rounding itself ({signs:.3g} and {nearest:.3g} nats), as if any change of the "
                "weights but that one set something off."
            )
        elif not gap.is_measurable:
            kind = "note"
            message = (
                f"Rounding to {gap.format} changes nothing: the weights lie on its grid, as if the model was made from "
                "one that was quantized so."
            )
        elif nearest > _BROKEN:
            kind = "note"
            message = f"Quantizing to {gap.format} breaks the model ({nearest:.3g} nats)."
        if message:
            found.append(
                Finding(
                    detector=name,
                    severity=kind,
                    message=message,
                    format=gap.format,
                    statistic="KL of rounding to the nearest over KL of random signs",
                    value=gap.value if math.isfinite(gap.value) else None,
                    expected=CLEAN,
                    p_value=min(large, small),
                    unsettled=unsettled,
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
            y_label="KL of rounding to the nearest / KL of random signs",
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
    """``(…, answers)``, over their first tokens."""
    means = [each[..., :tokens].mean(-1).clamp(1e-9, 1e9) for each in (one, other)]
    return (means[0] / means[1]).log()


def _above(values: Tensor, mean: float, spread: float = 0.0, freedom: int = 1 << 10) -> float:
    """The p-value of values ``(n,)`` whose mean would be at most that.

    Args:
        spread: standard deviation of what all of them have in common, of each of `DRAWS` and of the one they are
            compared with.
        freedom: how many degrees of freedom that was estimated with.
    """
    count = len(values)
    own = max(float(values.var()), _LEAST_SPREAD**2) / count
    common = spread**2 * (1 + 1 / DRAWS)
    degrees = int((own + common) ** 2 / (own**2 / (count - 1) + common**2 / freedom))  # Welch 1947
    return student_tail((float(values.mean()) - mean) / math.sqrt(own + common), degrees)


def _mean(divergences: Tensor) -> float:
    return float(divergences.mean())


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e9
