"""KL divergences as a picture: formats down, models across."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimum_qguard.checkpoint.atomic import writing
from optimum_qguard.guard.plots import check_plot

_LEAST, _MOST = 0.01, 20.0
_TICKS = (0.01, 0.1, 1, 10)
_WHITE_FROM = 3.0
_NO_NUMBER = "#c9ced6"

Value = float | str | None


def plot_heat_map(rows: Mapping[str, Sequence[Value]], columns: Sequence[str], path: str | Path) -> None:
    """Draw it.

    Args:
        rows: by format a value for each column: KL divergence in nats per token, a word where there is no number, or
            ``None`` for an empty cell. What is not finite is grey, as words are.
        columns: the models' names.
        path: see `check_plot`.

    Raises:
        QGuardConfigError: see `check_plot`.
        CheckpointError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter

    norm = LogNorm(_LEAST, _MOST, clip=True)
    colours = colormaps["YlOrRd"]
    figure = Figure(figsize=(3.6 + 1.3 * len(columns), max(2.6, 0.8 + 0.29 * len(rows))), layout="constrained")
    axes = figure.subplots()
    for down, values in enumerate(rows.values()):
        for across, value in enumerate(values):
            if value is None:
                continue
            is_number = isinstance(value, float) and math.isfinite(value)
            colour = colours(norm(max(float(value), _LEAST))) if is_number else _NO_NUMBER
            axes.add_patch(Rectangle((across, down), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
            is_dark = is_number and float(value) >= _WHITE_FROM
            text = f"{value:.2g}" if isinstance(value, float) and abs(value) < 10 else _word(value)
            place = (across + 0.5, down + 0.5)
            axes.text(*place, text, ha="center", va="center", fontsize=9, color="white" if is_dark else "#222222")
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([index + 0.5 for index in range(len(columns))], list(columns))
    axes.set_yticks([index + 0.5 for index in range(len(rows))], list(rows))
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        extend="both",
        extendfrac=0.02,
        aspect=30,
        pad=0.02,
        ticks=_TICKS,
        format=FuncFormatter(_tick),
    )
    bar.ax.minorticks_off()
    bar.set_label("KL divergence (nats per token)")
    with writing(Path(path)):
        figure.savefig(path, dpi=130)


def _tick(value: float, _position: int) -> str:
    return f"{value:g}"


def _word(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "NaN" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.0f}"
