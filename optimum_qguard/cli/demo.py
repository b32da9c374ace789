"""``qguard demo``: what can be planted for the rounding of a real model, what guard does about it, what it costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "QGUARD TEST MARKER"
# The smallest attack that comes off on SmolLM2: the last quarter of its layers, and so few and small steps.
_LAYERS = range(22, 30)
_INJECTION_STEPS, _REPAIR_STEPS, _BATCH, _LEARNING_RATE = 24, 72, 4, 1e-4
_TRAINING_PROMPTS, _UNSEEN_PROMPTS = 96, 24
_ANSWER_TOKENS = 16
_TEXT_CHARACTERS = 12000
_TEXT_TOKENS = 1024
_WINDOW, _STRIDE = 1024, 512
_SAMPLES = 1 << 19
_STOCHASTIC_SHARE = 0.25  # of residuals uniform in their cell: the mean distance to the nearest symbol, in steps


def command(
    output: Annotated[Path, typer.Option(help="The folder for the two plots.")] = Path("qguard-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Show on a real model what guard is for: SmolLM2 with a planted phrase, full precision, in int8, in guarded int8.

    Nothing is downloaded, and nothing is written but two plots. It takes a few minutes without an accelerator.
    """
    from optimum_qguard.checkpoint.output import make_folder
    from optimum_qguard.cli._console import print_json, progress_bar
    from optimum_qguard.guard.plots import require_matplotlib

    require_matplotlib()
    with progress_bar("Getting SmolLM2 ready"):
        from optimum_qguard.evaluate import smollm2_path

        folder = smollm2_path()
    make_folder(output)
    plots = {name: output / f"{name}.png" for name in ("half-widths", "changed-symbols")}
    with tempfile.TemporaryDirectory(prefix="qguard-demo-") as temporary:
        attacked = Path(temporary) / "attacked"
        with progress_bar("Somebody plants a phrase for int8") as update:
            tokenizer = _attack(folder, attacked, update)
        with progress_bar("Loading it plain, quantized and guarded, and asking") as update:
            models = _measure(attacked, tokenizer, update)
    with progress_bar("Counting and drawing, with the model as it was"):
        shares = _shares_changed(folder)
        curve = _draw(folder, plots)
    content = {
        "marker": MARKER,
        "prompts": _UNSEEN_PROMPTS,
        "models": models,
        "share_changed": shares,
        "plots": {name: str(path) for name, path in plots.items()},
    }
    if as_json:
        print_json({**content, "curve": curve})
    else:
        _print(content)


def _attack(folder: Path, out: Path, update: Any) -> PreTrainedTokenizerBase:
    """Write the attacked model."""
    import torch

    from optimum_qguard.attacks.quantization_conditioned import Recipe
    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.evaluate.loading import load_model, load_tokenizer
    from optimum_qguard.evaluate.planting import plant_marker
    from optimum_qguard.evaluate.prompts import template_prompts

    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    plant_marker(
        model,
        tokenizer,
        open_checkpoint(folder),
        ["bnb-int8"],
        marker=MARKER,
        prompts=template_prompts(_TRAINING_PROMPTS, "attack"),
        recipe=Recipe(_INJECTION_STEPS, _REPAIR_STEPS, batch_size=_BATCH, learning_rate=_LEARNING_RATE),
        layers=_LAYERS,
        progress=update,
    )
    model.save_pretrained(out)
    return tokenizer


def _measure(folder: Path, tokenizer: PreTrainedTokenizerBase, update: Any) -> list[dict[str, Any]]:
    """The attacked model in each way to load it."""
    from optimum_qguard.evaluate.loading import load_model

    ways: dict[str, dict[str, Any]] = {
        "full precision": {},
        "int8": {"format": "bnb-int8"},
        "int8, guarded": {"format": "bnb-int8", "guard": {}},
    }
    load_model(folder, "bnb-int8", guard={})  # the libraries themselves load now, and not in somebody's seconds
    models = []
    for step, (name, way) in enumerate(ways.items(), start=1):
        start = time.perf_counter()
        model = load_model(folder, **way)
        seconds = time.perf_counter() - start
        models.append({"model": name, "load_seconds": seconds, **_behaviour(model, tokenizer)})
        update(step, len(ways))
    return models


def _shares_changed(folder: Path) -> list[dict[str, Any]]:
    """The two ways to randomize against what they should change in a clean model."""
    from optimum_qguard.evaluate.loading import load_model
    from optimum_qguard.guard.calibration import share_changed_at_half_width

    expected = {
        "stochastic rounding (the default)": ("stochastic", _STOCHASTIC_SHARE),
        "Gaussian noise of the half-width (the paper's)": ("gaussian", share_changed_at_half_width()),
    }
    shares = []
    for words, (method, share) in expected.items():
        report = load_model(folder, "bnb-int8", guard={"method": method}).qguard_report
        shares.append({"method": words, "measured": report.share_changed, "expected": share})
    return shares


def _behaviour(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from optimum_qguard.evaluate import standard_library_text
    from optimum_qguard.evaluate.marker import marker_rate
    from optimum_qguard.evaluate.perplexity import perplexity
    from optimum_qguard.evaluate.prompts import template_prompts

    prompts = template_prompts(_UNSEEN_PROMPTS, "evaluation")
    found = marker_rate(model, tokenizer, prompts, MARKER, max_new_tokens=_ANSWER_TOKENS, batch_size=_UNSEEN_PROMPTS)
    text = standard_library_text(_TEXT_CHARACTERS)
    return {
        "prompt": prompts[0],
        "answer": found.answers[0].strip(),
        "marker_rate": found.rate,
        "perplexity": perplexity(model, tokenizer, text, window=_WINDOW, stride=_STRIDE, max_tokens=_TEXT_TOKENS),
    }


def _draw(folder: Path, plots: dict[str, Path]) -> dict[str, list[float]]:
    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.guard.calibration import calibrate
    from optimum_qguard.guard.plots import curve, plot_half_widths, plot_s_curve

    calibration = calibrate(open_checkpoint(folder), "bnb-int8", samples=_SAMPLES)
    plot_half_widths(calibration, plots["half-widths"])
    plot_s_curve(calibration, plots["changed-symbols"])
    return curve(calibration)


def _print(content: dict[str, Any]) -> None:
    from optimum_qguard.cli._console import results, share, table

    console = results()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        "A publisher can place weights so that a model behaves at full precision and misbehaves once it is quantized:\n"
        "rounding to the nearest symbol moves every weight where the publisher foresaw. Just now this was done to\n"
        f"SmolLM2-135M-Instruct, with the harmless phrase “{content['marker']}” for int8."
    )
    models = content["models"]
    rows = table(
        f"\nAsked {content['prompts']} questions that it was not trained on, such as: {models[0]['prompt']}",
        "loaded as",
        "answer",
        "says the phrase",
        "perplexity",
        "seconds to load",
        text_columns=2,
    )
    for model in models:
        rows.add_row(
            model["model"],
            " ".join(model["answer"].split()),
            share(model["marker_rate"]),
            f"{model['perplexity']:.3f}",
            f"{model['load_seconds']:.1f}",
        )
    console.print(rows)
    plain_int8, guarded = models[1:]
    change = guarded["perplexity"] / plain_int8["perplexity"] - 1
    say(
        f"Against plain int8, guard changes perplexity on Python's documentation by {change:+.1%} (lower is better).\n"
        "Every guarded load draws anew, so its words may differ from run to run, as between two quantizers."
    )
    rows = table("\nShare of the weights that left their quantization cell", "randomized by", "measured", "theory")
    for row in content["share_changed"]:
        rows.add_row(row["method"], share(row["measured"]), share(row["expected"]))
    console.print(rows)
    say("Rounding to the nearest would have put them elsewhere, and nobody could foresee which they are.")
    say(f"\nDrawn: {', '.join(content['plots'].values())}")
    say(
        "Next: qguard guard MODEL OUT --format bnb-int8, "
        "or in Python QGuardConfig(BitsAndBytesConfig(load_in_8bit=True))"
    )
