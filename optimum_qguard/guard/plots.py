"""The two figures of "Interval-Calibrated Noisy Quantization" for the user's own model: the distribution of half-widths
(figure 2), and the share of changed symbols over the noise (figure 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_qguard.checkpoint.atomic import writing
from optimum_qguard.guard.calibration import Calibration, CellSample, quartiles
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
_BLUE, _RED, _ORANGE = "#2f6db3", "#c0392b", "#f5b041"


def require_matplotlib() -> None:
    """Raise `QGuardConfigError` with the pip command if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise QGuardConfigError(
            "the package matplotlib is not installed; install it with: pip install 'optimum-qguard[plot]'"
        ) from error


def check_plot(path: str | Path) -> None:
    """Refuse a plot before any work is done.

    Raises:
        QGuardConfigError: matplotlib is not installed, no such folder, or a suffix that is none of `SUFFIXES`.
    """
    require_matplotlib()
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise QGuardConfigError(f"{path}: a plot's name ends in one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise QGuardConfigError(f"{path}: no such folder")


def plot_calibration(calibration: Calibration, path: str | Path) -> None:
    """Draw both figures side by side into one file.

    Args:
        calibration: with a sample.
        path: see `check_plot`.

    Raises:
        QGuardConfigError: see `check_plot`.
        QGuardError: half of the tensors or more are zero, so that there is nothing to draw.
        CheckpointError: the file cannot be written.
    """
    _draw(path, calibration, [_half_widths, _s_curve])


def plot_half_widths(calibration: Calibration, path: str | Path) -> None:
    """Draw the distribution of half-widths; arguments and errors as for `plot_calibration`."""
    _draw(path, calibration, [_half_widths])


def plot_s_curve(calibration: Calibration, path: str | Path) -> None:
    """Draw the share of changed symbols over the noise; arguments and errors as for `plot_calibration`."""
    _draw(path, calibration, [_s_curve])


def curve(calibration: Calibration, points: int = 49) -> dict[str, list[float]]:
    """The S-curve: ``sigma`` from 1/30 to 30 times the global half-width, and ``share_changed`` there; where it
    holds also the ``closed_form``.

    Raises:
        ValueError: a calibration without a sample.
        QGuardError: see `plot_calibration`.
    """
    sample = _sample_of(calibration)
    _check_drawable(calibration)
    sigmas = (calibration.global_half_width * torch.logspace(-1.5, 1.5, points, dtype=torch.float64)).tolist()
    shares = {"sigma": sigmas, "share_changed": [sample.share_changed(sigma) for sigma in sigmas]}
    if calibration.has_closed_form:
        shares["closed_form"] = [sample.closed_form(sigma) for sigma in sigmas]
    return shares


def _sample_of(calibration: Calibration) -> CellSample:
    if calibration.sample is None:
        raise ValueError("the calibration has no sample; call calibrate with samples=...")
    return calibration.sample


def _check_drawable(calibration: Calibration) -> None:
    if calibration.global_half_width == 0:
        raise QGuardError(
            "every weight of half the tensors or more is zero, so their cells have no width and there is nothing to "
            "draw; leave the plot out"
        )


def _draw(path: str | Path, calibration: Calibration, panels: list[Callable[[Axes, Calibration], None]]) -> None:
    check_plot(path)
    _check_drawable(calibration)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(6.6 * len(panels), 4.4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes, calibration)
        with writing(Path(path)):
            figure.savefig(path, dpi=150)


def _half_widths(axes: Axes, calibration: Calibration) -> None:
    widths = [tensor.half_width for tensor in calibration.tensors if tensor.half_width > 0]
    low, first, middle, third, high = quartiles(widths)
    edges = torch.logspace(math.log10(low * 0.97), math.log10(high * 1.03), 41).tolist()
    axes.hist(widths, edges, color=_BLUE, alpha=0.85)
    axes.axvspan(first, third, color=_BLUE, alpha=0.12, lw=0, label=f"quartiles {first:.2e} to {third:.2e}")
    axes.axvline(middle, color=_RED, lw=2, label=rf"median $\hat\sigma$ = {middle:.2e}")
    axes.set_title(f"Half-widths of {len(widths)} tensors in {calibration.format}")
    axes.set_xlabel("median half-width h of a tensor's quantization cells")
    axes.set_ylabel("number of tensors")
    _log_scale(axes)
    axes.legend(loc="best")


def _s_curve(axes: Axes, calibration: Calibration) -> None:
    shares, sigma = curve(calibration), calibration.global_half_width
    at_sigma = _sample_of(calibration).share_changed(sigma)
    axes.plot(
        shares["sigma"], [100 * share for share in shares["share_changed"]], color=_BLUE, lw=2.5, label="this model"
    )
    if "closed_form" in shares:
        expected = [100 * share for share in shares["closed_form"]]
        axes.plot(shares["sigma"], expected, color=_ORANGE, lw=1.5, ls=(0, (4, 4)), label="closed form")
    axes.axvline(sigma, color=_RED, lw=1)
    axes.plot([sigma], [100 * at_sigma], "o", color=_RED, label=rf"$\hat\sigma$ = {sigma:.2e}: {at_sigma:.1%} change")
    axes.set_ylim(0, 100)
    axes.set_title(f"Symbols changed by Gaussian noise in {calibration.format}")
    axes.set_xlabel(r"standard deviation $\sigma$ of the noise")
    axes.set_ylabel("weights whose symbol changes (%)")
    _log_scale(axes)
    axes.legend(loc="upper left")


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
