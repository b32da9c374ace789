"""The anchor: a clean checkpoint that a model's weights are held near while it is trained.

The loss is ``L + λ · mean over the T anchored tensors of mean((W - W₀)²)``. Its gradient at a tensor of n weights,
``2λ(W - W₀) / (T n)``, is added without autograd, tensor by tensor, from the memory-mapped checkpoint: no second model
is ever in memory. (The paper detaches W before its penalty, so its penalty has no gradient at all.)

Adam divides every gradient by its own size, a penalty's too, and what is left of a small λ is nothing. The decoupled
form is to this penalty what AdamW is to weight decay: after the optimizer's step, ``W ← W - ηλ(W - W₀)`` with the
learning rate η, so that whatever else happens the distance shrinks by the factor ``1 - ηλ`` in every step.

Source: METHODS section 6; Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.formats.scratch import CHUNK_WEIGHTS, Scratch
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.modules import DEFAULT_MODULES, anchored_modules

__all__ = ["DEFAULT_MODULES", "Anchor", "AnchorCallback"]


@dataclass(frozen=True)
class Anchor:
    """A clean checkpoint, of which one tensor at a time is looked at.

    Attributes:
        reader: the checkpoint.
        stored: by the name of each anchored parameter in the model, its name in the checkpoint.
    """

    reader: CheckpointReader
    stored: dict[str, str]

    @classmethod
    def open(
        cls,
        source: str | Path,
        model: nn.Module,
        *,
        modules: Sequence[str] = DEFAULT_MODULES,
        revision: str | None = None,
    ) -> Anchor:
        """Open a folder or a Hub repository as the anchor of a model.

        Raises:
            RepairError: it is quantized, of another architecture, or has other shapes or weights that are no numbers;
                or a pattern matches nothing.
            CheckpointError: it cannot be read.
        """
        reader = open_checkpoint(source, revision=revision)
        if reader.quantization_config is not None:
            raise RepairError(f"{source}: is quantized, so it cannot be an anchor; name its full-precision original")
        stored = {}
        for name, module in anchored_modules(model, modules).items():
            weight = module.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise RepairError(f"{name}: is quantized, so it cannot be trained; load the full-precision model")
            found = _name_in(reader, f"{name}.weight")
            if found is None:
                raise RepairError(f"{source}: has no tensor {name}.weight; an anchor is of the model's architecture")
            shape = tuple(reader.tensors[found].shape)
            if shape != tuple(weight.shape):
                raise RepairError(
                    f"{source}: {found} is {shape}, and the model's is {tuple(weight.shape)}; they must be alike"
                )
            stored[f"{name}.weight"] = found
        return cls(reader, stored)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the anchored parameters, in the model."""
        return tuple(self.stored)

    def tensor(self, name: str) -> Tensor:
        """The clean weight of a parameter, memory-mapped, in the checkpoint's dtype."""
        return self.reader.read(self.stored[name])

    @torch.no_grad()
    def add_gradient(self, model: nn.Module, strength: float) -> None:
        """Add ``2 strength (W - W₀) / (T n)`` to each gradient."""
        parameters = dict(model.named_parameters())
        for name in self.stored:
            parameter = parameters[name]
            if parameter.grad is not None:
                factor = 2 * strength / (len(self.stored) * parameter.numel())
                self._add_difference(parameter.grad, parameter, name, factor)

    @torch.no_grad()
    def pull(self, model: nn.Module, share: float) -> None:
        """``W ← W - share (W - W₀)``."""
        parameters = dict(model.named_parameters())
        for name in self.stored:
            self._add_difference(parameters[name], parameters[name], name, -share)

    def _add_difference(self, to: Tensor, weight: Tensor, name: str, factor: float) -> None:
        """``to += factor (weight - W₀)``, in pieces that stay in the cache."""
        scratch = Scratch()
        for target, current, clean in _pieces(to.data, weight.data, self.tensor(name)):
            difference = torch.sub(current, clean.to(current.device), out=scratch.like(current, "difference"))
            target.add_(difference, alpha=factor)

    @torch.no_grad()
    def squares(self, model: nn.Module) -> dict[str, tuple[float, int]]:
        """By parameter Σ (W - W₀)², and the number of weights."""
        parameters = dict(model.named_parameters())
        return {name: (self._square(parameters[name].data, name), parameters[name].numel()) for name in self.stored}

    def _square(self, weight: Tensor, name: str) -> float:
        return math.fsum(
            float((current.float() - clean.to(current.device).float()).square().sum(dtype=torch.float64))
            for current, clean in _pieces(weight, self.tensor(name))
        )

    def loss(self, model: nn.Module) -> float:
        """Mean over the anchored tensors of ``mean((W - W₀)²)``."""
        squares = self.squares(model)
        return math.fsum(square / n for square, n in squares.values()) / len(squares)

    def distance(self, model: nn.Module) -> float:
        """``√Σ (W - W₀)²`` over all of them."""
        return math.sqrt(math.fsum(square for square, _ in self.squares(model).values()))


class AnchorCallback(TrainerCallback):
    """Holds the weights of the model that a ``Trainer`` trains near an anchor's.

    Args:
        anchor: a clean checkpoint of the same architecture: a folder, or a Hub id with optional ``@revision``.
        strength: λ, 0 or more.
        decoupled: pull the weights after the optimizer's step, instead of adding the gradient before it.
        modules: which layers; see `anchored_modules`.
        log: add ``anchor_loss`` and ``anchor_distance`` to what the trainer logs.

    Raises:
        RepairError: a strength that makes no sense; and when training begins, what `Anchor.open` refuses.
    """

    def __init__(
        self,
        anchor: str | Path,
        *,
        strength: float,
        decoupled: bool = False,
        modules: Sequence[str] = DEFAULT_MODULES,
        log: bool = True,
    ) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise RepairError(f"strength is {strength:g}; it is 0 or more")
        self.source = anchor
        self.strength = strength
        self.decoupled = decoupled
        self.modules = tuple(modules)
        self.log = log
        self.anchor: Anchor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.anchor = Anchor.open(self.source, model, modules=self.modules)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.strength and not self.decoupled and self.anchor is not None:
            self.anchor.add_gradient(model, self.strength)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.strength and self.decoupled and self.anchor is not None:
            share = optimizer.param_groups[0]["lr"] * self.strength
            if share > 1:
                raise RepairError(
                    f"strength {self.strength:g} times the learning rate is {share:g}: more than 1 goes beyond the "
                    "anchor; give less of either"
                )
            self.anchor.pull(model, share)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if self.log and self.anchor is not None and logs is not None and "loss" in logs:
            measured = {"anchor_loss": self.anchor.loss(model), "anchor_distance": self.anchor.distance(model)}
            logs.update(measured)
            if state.log_history:
                state.log_history[-1].update(measured)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK_WEIGHTS):
        yield tuple(tensor[start : start + CHUNK_WEIGHTS] for tensor in flat)


def _name_in(reader: CheckpointReader, name: str) -> str | None:
    """A parameter's name in a checkpoint, which may have been saved with or without the base model's prefix."""
    candidates = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in ("model", "transformer"))]
    return next((candidate for candidate in candidates if candidate in reader), None)
