"""Models to repair, and how they are measured: what the benchmarks of repair share.

The clean model of the paper is *task-adapted*: fine-tuned on the text that repairs are trained on too. It and the noisy
models are made once and kept in the cache folder, half a gigabyte each for SmolLM2.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optimum_qguard.attacks.weight_noise import add_weight_noise
from optimum_qguard.checkpoint import atomic_write, open_checkpoint, transform_checkpoint
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.multiple_choice import hellaswag
from optimum_qguard.evaluate.perplexity import perplexity
from optimum_qguard.evaluate.prompt_suite import prompt_perplexities, suite_prompts
from optimum_qguard.repair.anchor import DEFAULT_MODULES
from optimum_qguard.repair.run import repair_checkpoint

SMOLLM2 = "SmolLM2-135M, off grid"
ADAPTING_STEPS = 200
TRAINING_CHARACTERS = 500_000
PRECISIONS = {"BF16": None, "INT8": "int8-rowwise", "4-BIT": "nf4"}
_NOISE_FILE = "noise.json"
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        block_size, accumulate: tokens of a sequence, and sequences of a step; the paper has 2,048 and 2.
        tokens: of the documentation of Python's standard library, for perplexity.
        other_tokens: of sentences from HellaSwag, which no model was trained on here.
        prompts: of the suite's 96, spread over its categories.
        device: where models run.
    """

    block_size: int
    accumulate: int
    tokens: int = 2560
    other_tokens: int = 1024
    prompts: int = 96
    device: str = "cpu"

    @property
    def trained(self) -> str:
        """What a trained model's name in the cache folder says."""
        return f"{self.block_size}x{self.accumulate}"

    @property
    def measured(self) -> str:
        """What a measurement's name says beside it."""
        return f"{self.tokens}-{self.other_tokens}-{self.prompts}-{self.device}"

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `repair_checkpoint` that all repairs share. Weights and optimizer are float32.

        On the CPU so is everything else: few have units for BF16."""
        return {
            "text": standard_library_text(TRAINING_CHARACTERS, "training"),
            "block_size": self.block_size,
            "accumulate": self.accumulate,
            "dtype": "float32" if self.device == "cpu" else "bfloat16",
            "checkpoint_every": 0,
            "device": "cpu" if self.device == "cpu" else None,
        }


def original(model: str) -> str | Path:
    """A folder or Hub id; `SMOLLM2` stands for the SmolLM2 of the package registry, moved off its Q4_1 grid."""
    return smollm2_path(off_grid=True) if model == SMOLLM2 else model


def adapted(model: str, scale: Scale) -> Path:
    """The clean model: fine-tuned on the training text."""
    name = f"repair-clean-{_slug(model)}-{scale.trained}"

    def make(folder: Path) -> None:
        repair_checkpoint(original(model), folder, anchor=None, steps=ADAPTING_STEPS, **scale.training)

    return made_once(cache_folder() / name, make)


def noised(model: str, scale: Scale, ratio: float, seed: int) -> Path:
    """The clean model with noise that multiplies its perplexity by ``ratio``; see `noise_of`."""
    name = f"repair-noised-{_slug(model)}-{scale.trained}-{scale.tokens}-{ratio:.2f}-{seed}"
    clean = adapted(model, scale)

    def make(folder: Path) -> None:
        reader = open_checkpoint(clean)
        loaded = load_model(clean, dtype=torch.float32, device=scale.device)

        def measure(noisy: Any) -> float:
            with torch.autocast(scale.device, torch.bfloat16, enabled=scale.device != "cpu"):
                return perplexity(noisy, load_tokenizer(clean), text(scale), max_tokens=scale.tokens)

        found = add_weight_noise(loaded, measure, ratio, seed=seed)
        noisy = {name: loaded.get_parameter(name).data for name in found.tensors}
        transform_checkpoint(reader, folder, lambda name, tensor: noisy[name].to(tensor) if name in noisy else tensor)
        atomic_write(
            folder / _NOISE_FILE,
            json.dumps({"sigma": found.sigma, "ratio": found.ratio, "measured": found.measured}),
        )

    return made_once(cache_folder() / name, make)


def noise_of(noisy: Path) -> dict[str, Any]:
    """``sigma``, ``ratio``, and every ``(sigma, ratio)`` that was ``measured`` on the way."""
    return dict(json.loads((noisy / _NOISE_FILE).read_text()))


def text(scale: Scale) -> str:
    """What perplexity is measured on: the documentation of other modules than those trained on."""
    return standard_library_text(_CHARACTERS_PER_TOKEN * scale.tokens)


@cache
def other_text() -> str:
    """Everyday prose: the beginnings of HellaSwag, each with its right end."""
    return "\n".join(f"{question.context} {question.choices[question.answer]}" for question in hellaswag())


def measure(folder: Path, scale: Scale, precisions: Sequence[str] = tuple(PRECISIONS)) -> dict[str, Any]:
    """For each precision perplexity on the ``text`` and on the ``other text``; in the first also of the ``prompts``.

    Precision is the weights'. On the CPU activations are float32.
    """
    tokenizer = load_tokenizer(folder)
    found: dict[str, Any] = {}
    for precision in precisions:
        model = load_model(folder, PRECISIONS[precision], dtype=torch.bfloat16, device=scale.device)
        model = model.float() if scale.device == "cpu" else model
        found[precision] = {
            "text": perplexity(model, tokenizer, text(scale), max_tokens=scale.tokens),
            "other text": perplexity(model, tokenizer, other_text(), max_tokens=scale.other_tokens),
        }
        if "prompts" not in found:
            found["prompts"] = prompt_perplexities(
                model, tokenizer, suite_prompts()[:: len(suite_prompts()) // scale.prompts]
            )
    return found


def distance(folder: Path, clean: Path) -> float:
    """Euclidean distance of the weights that anchors hold by default."""
    reader, other = open_checkpoint(folder), open_checkpoint(clean)
    names = [name for name in other.tensors if any(part in DEFAULT_MODULES for part in name.split("."))]
    squares = ((reader.read(name).double() - other.read(name).double()).square().sum() for name in names)
    return math.sqrt(sum(float(square) for square in squares))


def _slug(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model).strip("-").lower()
