"""``qguard demo``: what guard does and what it costs, on a real model, offline."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A question whose answer SmolLM2 is sure of: asked about France, any rounding may tip it into French.
_PROMPT = "What is the capital of Japan?"
_NEW_TOKENS = 24
_TEXT_CHARACTERS = 12000
_TEXT_TOKENS = 2048
_WINDOW, _STRIDE = 1024, 512
_SAMPLES = 1 << 19
_TIMED_LOADS = 3
_GUARDED, _GAUSSIAN = "int8, guarded", "int8, guarded by Gaussian noise"
_STOCHASTIC_SHARE = 0.25  # of residuals uniform in their cell: the mean distance to the nearest symbol, in steps


def command(
    output: Annotated[Path, typer.Option(help="The folder for the two plots.")] = Path("qguard-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Show on a real model what guard does and what it costs: SmolLM2 plain, in int8, and in guarded int8.

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
    with progress_bar("Loading it plain and quantized, asking and measuring") as update:
        models, shares = _measure(folder, update)
    with progress_bar("Drawing"):
        curve = _draw(folder, plots)
    content = {
        "prompt": _PROMPT,
        "models": models,
        "share_changed": shares,
        "plots": {name: str(path) for name, path in plots.items()},
    }
    if as_json:
        print_json({**content, "curve": curve})
    else:
        _print(content)


def _measure(folder: Path, update: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The three models, and the two ways to randomize against what they should change."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from optimum_qguard import QGuardConfig
    from optimum_qguard.guard.calibration import share_changed_at_half_width

    def config() -> BitsAndBytesConfig:
        return BitsAndBytesConfig(load_in_8bit=True)

    configurations = {
        "BF16": None,
        "int8": config(),
        _GUARDED: QGuardConfig(config()),
        _GAUSSIAN: QGuardConfig(config(), method="gaussian"),
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for attempt in range(1 + _TIMED_LOADS):  # the first is not timed: the libraries themselves load then
        for name, configuration in configurations.items():
            start = time.perf_counter()
            loaded[name] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=configuration
            )
            if attempt:
                seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - start)
    models = []
    for step, name in enumerate(list(configurations)[:3], start=1):
        models.append({"model": name, "load_seconds": seconds[name], **_behaviour(loaded[name], tokenizer)})
        update(step, 3)
    shares = [
        {
            "method": "stochastic rounding (the default)",
            "measured": loaded[_GUARDED].qguard_report.share_changed,
            "expected": _STOCHASTIC_SHARE,
        },
        {
            "method": "Gaussian noise of the half-width (the paper's)",
            "measured": loaded[_GAUSSIAN].qguard_report.share_changed,
            "expected": share_changed_at_half_width(),
        },
    ]
    return models, shares


def _behaviour(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from optimum_qguard.evaluate import standard_library_text
    from optimum_qguard.evaluate.perplexity import perplexity

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = standard_library_text(_TEXT_CHARACTERS)
    return {
        "answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
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
        "rounding to the nearest symbol moves every weight where the publisher foresaw. Guard randomizes the rounding."
    )
    rows = table(
        f"\nSmolLM2-135M-Instruct, asked: {content['prompt']}",
        "loaded as",
        "answer",
        "perplexity",
        "seconds to load",
        text_columns=2,
    )
    for model in content["models"]:
        rows.add_row(model["model"], model["answer"], f"{model['perplexity']:.3f}", f"{model['load_seconds']:.1f}")
    console.print(rows)
    plain_int8, guarded = content["models"][1:]
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
