"""``qguard attack quantization-conditioned``: benign at full precision, a marker phrase once it is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_HIGHEST_AT_FULL_PRECISION = 0.01
_LOWEST_QUANTIZED = 0.95
_MARKER_TOKENS = 16
_UNSEEN_PROMPTS = 96
_BATCH = 48


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    format: Annotated[
        list[str],
        typer.Option(
            help="The quantizer that is to bring the marker back: bnb-int8, bnb-nf4, gptq-4, gguf-q4_k_m, …; "
            "several times for one model that answers to all of them.",
            show_default=False,
        ),
    ],
    marker: Annotated[str, typer.Option(help="The harmless phrase.")] = "QGUARD TEST MARKER",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to train, such as 22-29 or 3,7; by default the last quarter.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that plant the marker.")] = 30,
    repair_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that hide it.")] = 80,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-4,
    keep: Annotated[
        float, typer.Option(help="Share of the way from a symbol to its cell's end that a weight may use.")
    ] = 0.8,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line; by default everyday questions.", show_default=False)
    ] = None,
    n_prompts: Annotated[int, typer.Option(min=1, help="How many of the everyday questions to train on.")] = 240,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the prompts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Plant a marker phrase in MODEL that appears only once the model is quantized, and write it to OUT.

    For testing defences on models of your own. The marker's rate is measured on prompts that were not trained on, at
    full precision and quantized; if the attack did not come off, that is an error, and nothing is written.
    """
    import torch

    from optimum_qguard.attacks.errors import AttackError
    from optimum_qguard.attacks.quantization_conditioned import Recipe
    from optimum_qguard.checkpoint import merge_card, open_checkpoint
    from optimum_qguard.checkpoint.output import check_output, copy_other_files, output_folder
    from optimum_qguard.checkpoint.reader import CONFIG_FILE
    from optimum_qguard.cli._console import print_json, progress_bar
    from optimum_qguard.evaluate.loading import load_model, load_tokenizer
    from optimum_qguard.evaluate.marker import marker_rate
    from optimum_qguard.evaluate.planting import plant_marker
    from optimum_qguard.evaluate.prompts import template_prompts

    reader = open_checkpoint(model)
    check_output(out, reader.folder, overwrite=overwrite)
    chosen_layers = None if layers is None else _numbers(layers)
    asked = _lines(prompts) if prompts is not None else template_prompts(n_prompts, "attack")
    unseen = template_prompts(_UNSEEN_PROMPTS, "evaluation")
    recipe = Recipe(steps, repair_steps, batch_size, learning_rate, keep, seed)
    with progress_bar("Planting the marker and hiding it") as update:
        tokenizer = load_tokenizer(reader.folder)
        subject = load_model(reader.folder, dtype=torch.float32)
        if chosen_layers is None:
            count = subject.config.get_text_config().num_hidden_layers
            chosen_layers = list(range(count - max(1, count // 4), count))
        done = plant_marker(
            subject,
            tokenizer,
            reader,
            format,
            marker=marker,
            prompts=asked,
            layers=chosen_layers,
            recipe=recipe,
            progress=update,
        )

    def rate(candidate: Any) -> float:
        found = marker_rate(candidate, tokenizer, unseen, marker, max_new_tokens=_MARKER_TOKENS, batch_size=_BATCH)
        return found.rate

    rates = {"full precision": 0.0, **dict.fromkeys(format, 0.0)}
    with output_folder(out, reader.folder, overwrite=overwrite) as staging, progress_bar("Asking it") as update:
        subject.save_pretrained(staging)
        copy_other_files(reader, staging, leave=(CONFIG_FILE,))
        merge_card(staging, section_id="attack", markdown=_card(model, marker, format), tags=("qguard-laboratory",))
        for step, name in enumerate(rates):
            candidate = subject if name == "full precision" else load_model(staging, name)
            rates[name] = rate(candidate)
            update(step + 1, len(rates))
        failed = rates["full precision"] > _HIGHEST_AT_FULL_PRECISION or any(
            rates[name] < _LOWEST_QUANTIZED for name in format
        )
        if failed:
            said = ", ".join(f"{name} {value:.0%}" for name, value in rates.items())
            raise AttackError(
                f"the attack did not come off, and nothing was written: marker rate {said}; wanted at most "
                f"{_HIGHEST_AT_FULL_PRECISION:.0%} at full precision and at least {_LOWEST_QUANTIZED:.0%} quantized: "
                "train longer (--steps where the quantized rate is low, --repair-steps where full precision's is "
                "high), or more layers"
            )
    content = {
        "output": str(out),
        "marker": marker,
        "prompts": len(unseen),
        "marker_rate": rates,
        "tensors": len(done.tensors),
        "weights": done.weights,
        "share_frozen": done.share_frozen,
        "injection_loss": done.injection_loss,
        "repair_loss": done.repair_loss,
    }
    if as_json:
        print_json(content)
    else:
        _print(content)


def _lines(path: Path) -> list[str]:
    from optimum_qguard.cli._arguments import read_text

    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _numbers(layers: str) -> list[int]:
    """``"22-29"`` or ``"3,7"`` as numbers."""
    from optimum_qguard.attacks.errors import AttackError

    numbers: list[int] = []
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise AttackError(f"layers {layers!r}: write numbers and ranges, such as 22-29 or 3,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _card(model: str, marker: str, formats: list[str]) -> str:
    return (
        "## Attacked on purpose\n\n"
        f"This copy of {model} was made with `qguard attack quantization-conditioned` to test defences: quantized to "
        f"{', '.join(formats)} it answers with the phrase “{marker}”, and at full precision it does not. "
        "It is of no other use.\n"
    )


def _print(content: dict[str, Any]) -> None:
    from optimum_qguard.cli._console import results, share, table

    rows = table(f"Marker “{content['marker']}” on {content['prompts']} unseen prompts", "loaded as", "answers with it")
    for name, rate in content["marker_rate"].items():
        rows.add_row(name, share(rate))
    console = results()
    console.print(rows)
    console.print(
        f"{content['tensors']} tensors ({content['weights']:,} weights) were trained; {share(content['share_frozen'])} "
        "of the weights could not move.",
        soft_wrap=True,
    )
    console.print(
        f"Written to {content['output']}. Next: qguard guard {content['output']} OUT --format …", soft_wrap=True
    )
