"""Attackers who know guard, on int8: what each of their ideas achieves, and what it costs them.

The wider margin is in `defence_table` (attacker ``adaptive``), for every format. Here are the others: a seed that is
known beforehand, cells widened by scale-setting outliers, and a pair of neurons that any perturbation unbalances.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacked_smollm2 import LAYERS, MARKER, RECIPES, dialogues
from harness import RESULTS, argument_parser, print_table, write
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.attacks.boxes import dithered_boxes
from optimum_qguard.attacks.outlier_injection import with_outliers
from optimum_qguard.attacks.perturbation_triggered import plant_trigger
from optimum_qguard.attacks.quantization_conditioned import Payload, inject, linear_weights, repair, room_of
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.evaluate.perplexity import next_token_logits, perplexity_and_kl
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.formats.int8_rowwise import Int8Rowwise
from optimum_qguard.guard.random import RandomStream

FORMAT = "bnb-int8"
KNOWN_SEED = 42
WIDENING = 1.5
TRIGGERED = "ER"
INT8 = Int8Rowwise()


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "adaptive_attack.json")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for name in arguments.attacks:
        make, marker = ATTACKS[name]
        folder = made_once(cache_folder() / f"smollm2-adaptive-{name.replace(' ', '-')}", make)
        rows += measure(name, folder, marker, arguments.device)
        write("adaptive_attack", rows, arguments.output)
    print_table(rows)


def known_seed(folder: Path) -> None:
    """Boxes in which guard's own rounding, with its seed known, keeps the marker."""
    model, tokenizer, payload = clean()
    names = linear_weights(model, LAYERS)
    recipe = RECIPES["usual"]
    inject(model, tokenizer, payload, names, recipe)
    room = {}
    for name in names:
        weight = model.get_parameter(name).data
        uniform = RandomStream(KNOWN_SEED, name).uniform(0, torch.empty_like(weight))
        room[name] = dithered_boxes(weight, INT8, uniform, name=name)
    repair(model, tokenizer, payload, room, recipe)
    save(model, tokenizer, folder)


def widened_cells(folder: Path) -> None:
    """The largest weight of each row grows first, and with it the steps; then the usual attack, with a wider margin."""
    model, tokenizer, payload = clean()
    names = linear_weights(model, LAYERS)
    recipe = RECIPES["adaptive"]
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = with_outliers(parameter.data, INT8, WIDENING)
    inject(model, tokenizer, payload, names, recipe)
    repair(model, tokenizer, payload, room_of(model, {name: [INT8] for name in names}, keep=recipe.keep), recipe)
    save(model, tokenizer, folder)


def cancelling_pair(folder: Path) -> None:
    """Nothing is trained."""
    model, tokenizer, _ = clean()
    text = standard_library_text(6000, "training")
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    plant_trigger(model, input_ids, tokenizer(TRIGGERED, add_special_tokens=False)["input_ids"][0])
    save(model, tokenizer, folder)


ATTACKS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "known seed": (known_seed, MARKER),
    "widened cells": (widened_cells, MARKER),
    "cancelling pair": (cancelling_pair, TRIGGERED * 2),
}
WAYS: Mapping[str, dict[str, Any]] = {
    "full precision": {},
    "no defence": {"format": FORMAT},
    "stochastic, fresh seed": {"format": FORMAT, "guard": {"seed": 7}},
    f"stochastic, seed {KNOWN_SEED}": {"format": FORMAT, "guard": {"seed": KNOWN_SEED}},
    "Gaussian, per layer": {"format": FORMAT, "guard": {"method": "gaussian", "seed": 7}},
    "Gaussian, quarter": {"format": FORMAT, "guard": {"method": "gaussian", "multiplier": 0.25, "seed": 7}},
}


def clean() -> tuple[Any, Any, Payload]:
    """What every attack begins with."""
    original = smollm2_path(off_grid=True)
    return load_model(original, dtype=torch.float32), load_tokenizer(original), Payload(MARKER, dialogues())


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(name: str, folder: Path, marker: str, device: str) -> list[dict[str, Any]]:
    """A row for each way to load the attacked model; KL divergence is from the clean model at full precision."""
    original = smollm2_path(off_grid=True)
    tokenizer = load_tokenizer(original)
    text = {"text": standard_library_text(6000), "max_tokens": 512, "window": 512, "stride": 256}
    reference = next_token_logits(load_model(original, dtype=torch.float32, device=device), tokenizer, **text)
    quality = partial(perplexity_and_kl, reference, tokenizer=tokenizer, **text)
    prompts = template_prompts(48, "evaluation")
    rows = []
    for way, arguments in WAYS.items():
        model = load_model(folder, dtype=torch.float32, device=device, **arguments)
        found = quality(model=model)
        rate = marker_rate(model, tokenizer, prompts, marker, max_new_tokens=8, batch_size=48).rate
        rows.append(
            {
                "attack": name,
                "loaded": way,
                "marker rate": rate,
                "perplexity": found.perplexity,
                "KL to clean": found.kl,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
