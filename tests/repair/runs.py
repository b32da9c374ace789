"""What tests of whole repairs share: quick settings, and what two checkpoints have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from repair_models import words
from safetensors.torch import load_file

TEXT = words(2000)
FAST: dict[str, Any] = {
    "text": TEXT,
    "steps": 20,
    "block_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "strength": 50.0,
    "checkpoint_every": 0,
    "device": "cpu",
}
EARLY_STOP: dict[str, Any] = {**FAST, "steps": 60, "evaluate_every": 4, "patience": 2, "learning_rate": 3e-3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance(one: Path, other: Path) -> float:
    """Of the weights that are held near the anchor."""
    here, there = weights(one), weights(other)
    squares = [(here[name].double() - there[name].double()).square().sum() for name in here if "_proj" in name]
    return float(sum(squares)) ** 0.5


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(step: int) -> Callable[[int, int], None]:
    def interrupt(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return interrupt
