"""``qguard calibrate``: how wide a quantizer's cells are in a model; nothing is written but plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optimum_qguard.guard.calibration import Calibration

_SAMPLES = 1 << 19


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(help="bnb-int8, bnb-nf4, gguf-q4_k_m, nf4, …; an unknown name lists all.", show_default=False),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the half-widths, and the share of changed symbols over the noise (.png, .svg or .pdf).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every tensor as JSON.")] = False,
) -> None:
    """Measure the half-widths of the quantization cells of MODEL, which calibrate the noise.

    The checkpoint is read tensor by tensor; the model is not loaded and nothing is quantized.
    """
    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.cli._console import print_json, progress_bar
    from optimum_qguard.guard.architecture import refuse_quantized
    from optimum_qguard.guard.calibration import calibrate
    from optimum_qguard.guard.plots import check_plot, curve, plot_calibration

    if plot is not None:
        check_plot(plot)
    reader = open_checkpoint(model)
    refuse_quantized(reader)
    with progress_bar(f"Measuring {format}") as update:
        calibration = calibrate(reader, format, samples=0 if plot is None else _SAMPLES, progress=update)
        if plot is not None:
            plot_calibration(calibration, plot)
    if as_json:
        content = _content(model, calibration)
        print_json(content if plot is None else {**content, "plot": str(plot), "curve": curve(calibration)})
    else:
        _print(model, calibration, plot)


def _content(model: str, calibration: Calibration) -> dict[str, Any]:
    return {
        "model": model,
        "format": calibration.format,
        "global_half_width": calibration.global_half_width,
        "tensors": [vars(tensor) for tensor in calibration.tensors],
    }


def _print(model: str, calibration: Calibration, plot: Path | None) -> None:
    from optimum_qguard.cli._console import number, results, table
    from optimum_qguard.guard.calibration import by_pattern, quartiles

    rows = table(
        f"Half-widths of the quantization cells: {model}, {calibration.format}",
        *("tensor", "becomes", "tensors", "minimum", "quartile 1", "median", "quartile 3", "maximum"),
        text_columns=2,
    )
    for pattern, tensors in by_pattern(calibration.tensors).items():
        for kind in dict.fromkeys(tensor.format for tensor in tensors):
            widths = [tensor.half_width for tensor in tensors if tensor.format == kind]
            rows.add_row(pattern, kind, str(len(widths)), *map(number, quartiles(widths)))
    rows.add_section()
    every = [tensor.half_width for tensor in calibration.tensors]
    rows.add_row("all", "", str(len(every)), *map(number, quartiles(every)))
    console = results()
    console.print(rows)
    console.print(
        f"Global half-width {calibration.global_half_width:.3e}, the median over tensors: "
        "--noise global adds noise of this size to every tensor, --noise per_layer of each tensor's own.",
        soft_wrap=True,
    )
    if plot is not None:
        console.print(f"Drawn in {plot}.", soft_wrap=True)
