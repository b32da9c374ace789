"""``qguard precision allocate``: the widths that hurt a model least within a budget of bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optimum_qguard.evaluate.perplexity import Quality
    from optimum_qguard.precision.allocate import Allocation

_CHARACTERS_PER_TOKEN = 8


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    bits: Annotated[
        float, typer.Option(help="Average bits of a weight of the linear layers, 2 to 8.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the bit map (.yaml, .yml or .json).", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the map and what budgets are predicted to give (.png, .svg or .pdf).", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file: its first half to measure layers on, its second to compare maps on; by default Python's "
            "own documentation.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of each half.", min=2)] = 256,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; 0 for whole rows.", min=0)] = 32,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to keep measurements in: other budgets then need none, and a run that was stopped goes "
            "on where it was.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure what quantizing each layer of MODEL does to its predictions, and give bits to where they count.

    The map is compared with uniform widths on another text. Load with it by PrecisionConfig(BitMap.load(FILE)).
    """
    import torch

    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.cli._console import print_json, progress_bar
    from optimum_qguard.evaluate.bitmaps import Judge, plot_allocation
    from optimum_qguard.evaluate.loading import load_model, load_tokenizer
    from optimum_qguard.guard.architecture import refuse_quantized
    from optimum_qguard.guard.plots import check_plot
    from optimum_qguard.precision.allocate import allocate, check_budget
    from optimum_qguard.precision.bitmap import BitMap, check_suffix
    from optimum_qguard.precision.errors import PrecisionError
    from optimum_qguard.precision.sensitivity import measure_sensitivity

    check_budget(bits)
    if output is not None:
        check_suffix(output)
    if plot is not None:
        check_plot(plot)
    for path in (output, sensitivity):
        if path is not None and not path.absolute().parent.is_dir():
            raise PrecisionError(f"{path}: no such folder; make it, or name another")
    refuse_quantized(open_checkpoint(model))
    measured, held_out = _texts(text, tokens)
    formats: dict[str, Any] = {"group_size": group_size or None}
    with progress_bar(f"Measuring the layers of {model}") as update:
        loaded, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
        judge = Judge(loaded, tokenizer, held_out, max_tokens=tokens, **formats)
        found = measure_sensitivity(
            loaded, tokenizer, measured, tokens=tokens, cache=sensitivity, progress=update, **formats
        )
        allocation = allocate(found, bits)
        rows = [_row("full precision", None, None, judge.quality(None))]
        for width in sorted({math.floor(bits), math.ceil(bits)}):
            uniform = dict.fromkeys(allocation.widths, width)
            quality = judge.quality(BitMap(uniform))
            rows.append(_row(f"uniform {width}", float(width), found.predict(uniform), quality))
        quality = judge.quality(allocation.bitmap)
        rows.append(_row("allocated", allocation.average_bits, allocation.predicted, quality))
        if output is not None:
            allocation.bitmap.save(output)
        if plot is not None:
            plot_allocation(allocation, found, plot)
    if as_json:
        content = {"model": model, "bits": bits, "tokens": found.tokens, "group_size": group_size or None}
        print_json({**content, "maps": rows, "bitmap": allocation.bitmap.to_dict()})
    else:
        _print(model, allocation, rows, [path for path in (output, plot) if path is not None])


def _texts(path: Path | None, tokens: int) -> tuple[str, str]:
    from optimum_qguard.cli._arguments import read_text
    from optimum_qguard.evaluate import standard_library_text

    if path is None:
        length = _CHARACTERS_PER_TOKEN * tokens
        return standard_library_text(length, "training"), standard_library_text(length, "evaluation")
    content = read_text(path)
    return content[: len(content) // 2], content[len(content) // 2 :]


def _row(name: str, average_bits: float | None, predicted: float | None, quality: Quality) -> dict[str, Any]:
    return {
        "map": name,
        "average_bits": average_bits,
        "predicted_kl": predicted,
        "kl": quality.kl,
        "perplexity": quality.perplexity,
    }


def _print(model: str, allocation: Allocation, rows: list[dict[str, Any]], written: list[Path]) -> None:
    from optimum_qguard.cli._console import number, results, table
    from optimum_qguard.precision.kinds import by_kind

    console = results()
    grid = table(f"Bits of each layer: {model}", "layer", "bits, from the first block to the last", text_columns=2)
    for kind, layers in by_kind(allocation.widths).items():
        grid.add_row(kind, " ".join(str(bits) for _, bits in sorted(layers.items())))
    console.print(grid)
    compared = table(
        "On a text that it was not measured on", "map", "average bits", "predicted KL", "KL divergence", "perplexity"
    )
    for row in rows:
        bits = "-" if row["average_bits"] is None else f"{row['average_bits']:.3f}"
        compared.add_row(row["map"], bits, number(row["predicted_kl"]), number(row["kl"]), f"{row['perplexity']:.3f}")
    console.print(compared)
    for path in written:
        console.print(f"Written: {path}", soft_wrap=True)
