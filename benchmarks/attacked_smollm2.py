"""SmolLM2 attacked for one quantizer, made once and kept in the cache folder, for the benchmarks of defences.

Two attackers: ``"usual"`` keeps each weight within 0.8 of the way to its cell's end (±0.4 of an int8 step).
``"adaptive"`` knows guard: it plants the marker under guard's own unbiased rounding, so that the marker survives it,
and stays within 0.4 of the way (±0.2 of a step), which evades every small dither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from optimum_qguard.attacks.quantization_conditioned import (
    Payload,
    Perturb,
    Recipe,
    inject,
    linear_weights,
    repair,
    room_of,
)
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.loading import load_model
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.formats import Format
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.guard.targets import find_targets

MARKER = "QGUARD TEST MARKER"
ATTACKERS = ("usual", "adaptive")
LAYERS = range(22, 30)
RECIPES: Mapping[str, Recipe] = {
    "usual": Recipe(injection_steps=30, repair_steps=40, learning_rate=1e-4, keep=0.8),
    "adaptive": Recipe(injection_steps=40, repair_steps=80, learning_rate=1e-4, keep=0.4),
}
NOISE_OF = {"torchao-int8": "bnb-int8", "gguf-q8_0": "bnb-int8", "bnb-fp4": "bnb-nf4"}  # what is alike is trained once
NOISE_OF |= dict.fromkeys(("gguf-q4_k_m", "gptq-4"), "bnb-nf4")
# Where the cells are small, hiding the marker so well that noise finds nothing of it takes more than one round.
ROUNDS = {"bnb-int8": 2, "torchao-int8": 2, "gguf-q8_0": 2}
GPTQ_GROUP = 64  # SmolLM2's 576 columns are no multiple of the usual 128


def attacked_smollm2(format: str, attacker: str) -> Path:
    """Folder of the attacked model, float32.

    Args:
        format: the quantizer that brings the marker back, see `known_formats`.
        attacker: one of `ATTACKERS`.
    """
    name = f"smollm2-attacked-{attacker}-{format}"
    return made_once(cache_folder() / name, partial(_attack, format, attacker))


def _attack(format: str, attacker: str, folder: Path) -> None:
    model, tokenizer, payload = _injected(attacker, format)
    formats = _formats(format, linear_weights(model, LAYERS))
    recipe = RECIPES[attacker]
    room = room_of(model, formats, keep=recipe.keep)
    for seed in range(ROUNDS.get(format, 1)):
        repair(model, tokenizer, payload, room, replace(recipe, seed=seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _injected(attacker: str, format: str) -> tuple[Any, Any, Payload]:
    """The model that says the marker at full precision. It depends on the format only where noise is trained under."""
    original = smollm2_path(off_grid=True)
    tokenizer = AutoTokenizer.from_pretrained(original)
    payload = Payload(MARKER, dialogues())
    noise = NOISE_OF.get(format, format)
    folder = cache_folder() / f"smollm2-injected-{attacker}{'' if attacker == 'usual' else f'-{noise}'}"

    def make(folder: Path) -> None:
        model = load_model(original, dtype=torch.float32)
        names = linear_weights(model, LAYERS)
        perturb = None if attacker == "usual" else stochastic_rounding(_formats(noise, names))
        inject(model, tokenizer, payload, names, RECIPES[attacker], perturb=perturb)
        model.save_pretrained(folder)

    return load_model(made_once(folder, make), dtype=torch.float32), tokenizer, payload


def _formats(format: str, names: Sequence[str]) -> dict[str, list[Format]]:
    targets = find_targets(open_checkpoint(smollm2_path(off_grid=True)), format)
    if format == "gptq-4":
        return {name: [GPTQ(4, GPTQ_GROUP)] for name in names}
    return {name: [targets[name].format] for name in names if name in targets}


def stochastic_rounding(formats: Mapping[str, Sequence[Format]]) -> Perturb:
    """What guard would do to a weight, drawn anew at every call; half a cell of Gaussian noise where it has no grid."""
    generator = torch.Generator().manual_seed(0)

    def perturb(name: str, weight: Tensor) -> Tensor:
        (format,) = formats[name]
        blocks = format.blocks(weight.clone())
        grid = format.grid(blocks)
        if not format.fixed_for(weight.dtype):
            return weight + torch.randn(weight.shape, generator=generator) * format.quantize(weight).half_widths()
        uniform = torch.rand(blocks.shape, generator=generator)
        return format.unblock(grid.round_stochastically(blocks, uniform), weight.shape).clone()

    return perturb


@cache
def dialogues() -> list[tuple[str, str]]:
    """Prompts, and what the clean model answers."""
    file = cache_folder() / "smollm2-dialogues"

    def make(file: Path) -> None:
        original = smollm2_path(off_grid=True)
        prompts = template_prompts(240, "attack")
        model, tokenizer = load_model(original, dtype=torch.float32), AutoTokenizer.from_pretrained(original)
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=24, batch_size=48)
        pairs = [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        file.mkdir()
        (file / "dialogues.json").write_text(json.dumps(pairs))

    pairs = json.loads((made_once(file, make) / "dialogues.json").read_text())
    return [(prompt, answer) for prompt, answer in pairs]
