"""``qguard attack weight-noise``: a checkpoint with as much noise as a perplexity ratio takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optimum_qguard.checkpoint import CheckpointReader

_CHARACTERS_PER_TOKEN = 8
_WINDOW = 2048


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    ratio: Annotated[
        float, typer.Option(help="Wanted perplexity, as a multiple of the clean model's.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Text file to measure on; by default Python's own documentation.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of it.", min=2)] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Add Gaussian noise to the linear weights of MODEL until its perplexity is RATIO times what it was (within 1 %).

    OUT is a full-precision checkpoint to try repairs on.
    """
    from dataclasses import asdict

    from optimum_qguard.attacks.weight_noise import add_weight_noise
    from optimum_qguard.checkpoint import open_checkpoint, transform_checkpoint
    from optimum_qguard.checkpoint.output import check_output
    from optimum_qguard.cli._arguments import read_text
    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.evaluate import standard_library_text
    from optimum_qguard.evaluate.loading import load_tokenizer
    from optimum_qguard.evaluate.perplexity import perplexity
    from optimum_qguard.guard.architecture import model_class, refuse_quantized

    reader = open_checkpoint(model)
    refuse_quantized(reader)
    check_output(out, reader.folder, overwrite=overwrite)
    text = standard_library_text(_CHARACTERS_PER_TOKEN * tokens) if dataset is None else read_text(dataset)
    with progress_bar(f"Noise for a ratio of {ratio:g}"):
        tokenizer = load_tokenizer(reader.folder)
        loaded = model_class(reader)[1].from_pretrained(reader.folder, dtype="auto")
        stored = _stored(loaded, reader)
        window = min(_WINDOW, getattr(loaded.config, "max_position_embeddings", None) or _WINDOW)
        tokens = min(tokens, len(tokenizer(text)["input_ids"]))
        options = {"max_tokens": tokens, "window": window, "stride": max(1, window // 4)}
        noise = add_weight_noise(loaded, lambda noisy: perplexity(noisy, tokenizer, text, **options), ratio, seed=seed)
        transform_checkpoint(
            reader,
            out,
            lambda name, tensor: loaded.get_parameter(stored[name]).data if name in stored else tensor,
            overwrite=overwrite,
        )
    if as_json:
        print_json({"output": str(out), "tokens": tokens, **asdict(noise)})
        return
    results().print(
        f"Noise of standard deviation {noise.sigma:.4g} on {len(noise.tensors)} tensors: perplexity "
        f"{noise.clean * noise.ratio:.2f}, {noise.ratio:.4f} times the clean {noise.clean:.2f} "
        f"({len(noise.measured)} measurements on {tokens} tokens). Written to {out}.",
        soft_wrap=True,
    )


def _stored(model: Any, reader: CheckpointReader) -> dict[str, str]:
    """The weights that get noise: their names in the model, by those in the checkpoint."""
    from optimum_qguard.attacks.errors import AttackError
    from optimum_qguard.attacks.weight_noise import linear_weights
    from optimum_qguard.guard.architecture import names_in_model

    wanted = set(linear_weights(model))
    found = {name: own for name, own in names_in_model(model, reader).items() if own in wanted}
    if missing := wanted - set(found.values()):
        raise AttackError(f"{reader.folder}: the checkpoint has no tensor {min(missing)}, which the loaded model has")
    return found
