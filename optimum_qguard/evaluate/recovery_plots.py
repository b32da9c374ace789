"""The figures of the paper on anchor-guided repair for a run of one's own: noise against perplexity (its figures 2 and
3), ordering over prompts (5 and 6), their variance (7 and 8), and recovery by category (9 and 10)."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_qguard.checkpoint.atomic import writing
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.recovery import PromptComparison, noise_curve
from optimum_qguard.guard.plots import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLEAN, _ATTACKED, _DEFENDED, _GREY = "#1e8449", "#c0392b", "#2f6db3", "#7f8c8d"
_COLOURS = (
    "#2f6db3",
    "#f5b041",
    "#8e44ad",
    "#16a085",
    "#7f8c8d",
    "#c0392b",
    "#5dade2",
    "#6e2c00",
    "#f1948a",
    "#a2d149",
)
_CURVE_POINTS = 101
_LARGEST_SHARE = 1.5
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def plot_noise(measured: Mapping[float, float], targets: Mapping[float, float], path: str | Path) -> None:
    """Draw the ratio of perplexities over the noise, with the curve ``exp(a sigma**2 + b)`` fitted to all points.

    Args:
        measured: ratio to the clean model's perplexity, by the noise's standard deviation.
        targets: of those points the ones that were looked for: the wanted ratio, by the noise found for it.
        path: see `check_plot`.

    Raises:
        EvaluationError: see `noise_curve`.
        QGuardConfigError: see `check_plot`.
        CheckpointError: the file cannot be written.
    """
    slope, offset = noise_curve(measured)
    with _axes(path, (6.6, 4.4)) as axes:
        highest = 1.08 * max(measured)
        sigmas = [index * highest / (_CURVE_POINTS - 1) for index in range(_CURVE_POINTS)]
        ratios = [math.exp(slope * sigma**2 + offset) for sigma in sigmas]
        label = rf"fit: $\log r = {slope:.4g}\,\sigma^2 {offset:+.2g}$"
        axes.plot(sigmas, ratios, color=_DEFENDED, lw=2, label=label)
        axes.plot(list(measured), list(measured.values()), "o", color=_GREY, ms=5, label="measured")
        found = [measured[sigma] for sigma in targets]
        axes.plot(list(targets), found, "o", color=_ATTACKED, ms=7, label="used")
        for sigma, ratio in targets.items():
            place = (sigma, measured[sigma])
            axes.annotate(f"{ratio:.2f}", place, (-8, 6), textcoords="offset points", ha="right", color=_ATTACKED)
        axes.set_title("Weight noise and perplexity")
        axes.set_xlabel(r"standard deviation $\sigma$ of the noise")
        axes.set_ylabel("perplexity / clean perplexity")
        axes.set_xlim(0, highest)
        axes.legend(loc="upper left")


def plot_ordering(compared: Mapping[str, PromptComparison], path: str | Path) -> None:
    """Draw the shares of prompts with ``defended < attacked`` and with ``clean < defended < attacked``.

    Args:
        compared: by label, drawn from left to right.
        path: see `check_plot`.

    Raises:
        QGuardConfigError, CheckpointError: as for `plot_noise`.
    """
    shares = {
        "defended < attacked": [each.improved for each in compared.values()],
        "clean < defended < attacked": [each.ordered for each in compared.values()],
    }
    with _axes(path, _wide(compared)) as axes:
        for index, (label, values) in enumerate(shares.items()):
            places = [place + 0.4 * index for place in range(len(values))]
            bars = axes.bar(
                places, [100 * value for value in values], 0.38, color=_COLOURS[index % len(_COLOURS)], label=label
            )
            axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set_xticks([place + 0.2 for place in range(len(compared))], [_wrapped(label) for label in compared])
        axes.set_ylim(0, 118)
        axes.set_yticks(range(0, 101, 20))
        axes.set_title("Perplexity prompt by prompt")
        axes.set_ylabel("prompts (%)")
        axes.legend(loc="upper left", ncols=2, fontsize=9)


def plot_variance(compared: Mapping[str, PromptComparison], path: str | Path) -> None:
    """Draw mean and standard deviation over the prompts of the three models' perplexities, and the variance reduction.

    Args:
        compared: by label, drawn from left to right.
        path: see `check_plot`.

    Raises:
        EvaluationError: see `PromptComparison.variance_reduction`.
        QGuardConfigError, CheckpointError: as for `plot_noise`.
    """
    reductions = [each.variance_reduction for each in compared.values()]
    models = {"clean": _CLEAN, "attacked": _ATTACKED, "defended": _DEFENDED}
    with _axes(path, _wide(compared)) as axes:
        top = 0.0
        for index, (model, colour) in enumerate(models.items()):
            values = [getattr(each, model) for each in compared.values()]
            means = [statistics.fmean(each) for each in values]
            deviations = [statistics.pstdev(each) for each in values]
            top = max(top, *(mean + deviation for mean, deviation in zip(means, deviations, strict=True)))
            places = [place + 0.25 * (index - 1) for place in range(len(values))]
            axes.errorbar(places, means, deviations, fmt="o", color=colour, capsize=5, lw=2, label=model)
        for place, reduction in enumerate(reductions):
            axes.text(place, 1.04 * top, f"{-reduction:+.0%}", ha="center", color=_DEFENDED)
        axes.set_xticks(range(len(compared)), [_wrapped(label) for label in compared])
        axes.set_ylim(0, 1.32 * top)
        axes.set_title("Variance over prompts, changed by the repair")
        axes.set_ylabel("perplexity, mean ± standard deviation")
        axes.legend(loc="upper left", ncols=3)


def plot_categories(recoveries: Mapping[str, Mapping[str, float | None]], path: str | Path) -> None:
    """Draw recovery by category of prompts.

    Args:
        recoveries: by label what `PromptComparison.by_category` gave, the same categories in each. What is below -50 %
            or above 150 % is drawn up to there, with its number.
        path: see `check_plot`.

    Raises:
        EvaluationError: categories that differ.
        QGuardConfigError, CheckpointError: as for `plot_noise`.
    """
    categories = list(next(iter(recoveries.values()), ()))
    if not categories or any(list(each) != categories for each in recoveries.values()):
        raise EvaluationError("the repairs were not measured on the same categories")
    height = 0.8 / len(recoveries)
    inches = 1.6 + 0.42 * len(categories) * max(1.0, 0.3 * len(recoveries))
    with _axes(path, (7.2, inches)) as axes:
        for index, (label, values) in enumerate(recoveries.items()):
            places = [down + height * (index - (len(recoveries) - 1) / 2) for down in range(len(categories))]
            shares = [values[category] for category in categories]
            shown = [0.0 if share is None else _clipped(share) for share in shares]
            axes.barh(
                places, [100 * share for share in shown], height, color=_COLOURS[index % len(_COLOURS)], label=label
            )
            for place, share, end in zip(places, shares, shown, strict=True):
                text = "no harm done" if share is None else f"{share:.0%}" if share != end else ""
                axes.text(100 * max(end, 0) + 1, place, text, va="center", fontsize=8, color=_GREY)
        axes.axvline(100, color=_CLEAN, lw=1, ls=(0, (4, 4)))
        axes.axvline(0, color=_GREY, lw=1)
        axes.set_yticks(range(len(categories)), categories)
        axes.set_ylim(len(categories) - 0.4, -0.6)
        axes.set_title("Recovery by category of prompts")
        axes.set_xlabel("recovery of mean perplexity (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.6 / inches), ncols=2, fontsize=9)


def _wide(compared: Mapping[str, PromptComparison]) -> tuple[float, float]:
    return max(5.2, 2.2 + 1.5 * len(compared)), 4.4


def _clipped(share: float) -> float:
    return min(max(share, 1 - _LARGEST_SHARE), _LARGEST_SHARE)


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n")


@contextlib.contextmanager
def _axes(path: str | Path, size: Sequence[float]) -> Iterator[Axes]:
    """Axes of a figure that is written to ``path`` when the block ends."""
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(size[0], size[1]), layout="constrained")
        yield figure.subplots()
        with writing(Path(path)):
            figure.savefig(path, dpi=130)
