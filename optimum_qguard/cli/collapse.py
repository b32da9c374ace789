"""``qguard collapse``: what quantizers make of a protected model, beside what they make of its original."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimum_qguard.cli._measuring import (
    AsJson,
    BatchSize,
    Data,
    Limit,
    MaxNewTokens,
    MaxTokens,
    Model,
    Prompts,
    sources,
)

if TYPE_CHECKING:
    from optimum_qguard.evaluate.collapse import Cell, Row

_FULL_PRECISION = "full precision"


def command(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="The original; by default MODEL is compared with itself.", show_default=False)
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            help="bnb-int8, gguf-q4_k_m, …, with commas between; an unknown name lists all.  "
            "[default: all whose library is installed]",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="What else qguard evaluate measures, with commas between.")
    ] = "degeneration",
    data: Data = None,
    limit: Limit = 100,
    prompts: Prompts = 16,
    max_new_tokens: MaxNewTokens = 64,
    max_tokens: MaxTokens = 512,
    batch_size: BatchSize = 16,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw KL divergence as a heat map (.png, .svg or .pdf).", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL and its original to each format: KL divergence, perplexity, repetition.

    A format whose quantizer refuses the model is a row that says so. Nothing is written but the plot.
    """
    from optimum_qguard.cli._arguments import comma_separated
    from optimum_qguard.cli._console import print_json, progress_bar
    from optimum_qguard.evaluate.collapse import collapse
    from optimum_qguard.evaluate.heat_map import plot_heat_map
    from optimum_qguard.guard.plots import check_plot

    if plot is not None:
        check_plot(plot)
    with progress_bar(f"Quantizing and measuring {model}") as update:
        rows = collapse(
            model,
            reference,
            None if formats is None else comma_separated(formats),
            tasks=comma_separated(tasks),
            progress=update,
            data=sources(data or []),
            limit=limit,
            n_prompts=prompts,
            max_new_tokens=max_new_tokens,
            max_tokens=max_tokens,
            batch_size=batch_size,
        )
        if plot is not None:
            names = ["protected"] if reference is None else ["original", "protected"]
            values = {row.format or _FULL_PRECISION: [_kl(cell) for cell in row.cells.values()] for row in rows}
            plot_heat_map(values, names, plot)
    if as_json:
        content = [{"format": row.format, **{name: cell.as_json() for name, cell in row.cells.items()}} for row in rows]
        found = {"model": model, "reference": reference or model, "rows": content}
        print_json(found if plot is None else {**found, "plot": str(plot)})
    else:
        _print(model, reference, rows, plot)


def _print(model: str, reference: str | None, rows: list[Row], plot: Path | None) -> None:
    from optimum_qguard.cli._console import results, table

    figures = [(task, figure) for task, found in rows[0].protected.figures.items() for figure in found]
    figures.sort(key=lambda pair: pair[1] != "kl")
    times = Counter(figure for _, figure in figures)
    titles = [figure if times[figure] == 1 else f"{task} {figure}" for task, figure in figures]
    shown = table(model, "format", "model", *titles, text_columns=2)
    refusals = []
    for row in rows:
        name = row.format or _FULL_PRECISION
        for which, cell in row.cells.items():
            if cell.refusal is None:
                values = [_number(cell.figures[task][figure]) for task, figure in figures]
            else:
                values = ["refused", *("-" for _ in figures[1:])]
                refusals.append(f"{name}, {which}: {cell.refusal}")
            shown.add_row(name, which, *values)
    console = results()
    console.print(shown)
    for line in refusals:
        console.print(f"Refused: {line}", soft_wrap=True)
    console.print(f"KL divergence is from {reference or model} at full precision, in nats per token.", soft_wrap=True)
    if plot is not None:
        console.print(f"Drawn in {plot}.", soft_wrap=True)


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def _kl(cell: Cell) -> float | str:
    return "refused" if cell.kl is None else cell.kl
