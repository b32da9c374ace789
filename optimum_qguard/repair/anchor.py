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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.checkpoint.mapped import map_tensor
from optimum_qguard.checkpoint.spelling import spellings
from optimum_qguard.formats.scratch import CHUNK_WEIGHTS
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.merged import Stored, merged_tensors
from optimum_qguard.repair.modules import DEFAULT_MODULES, anchored_layers, as_patterns, transformers_model
from optimum_qguard.repair.weights import LoraWeight, PlainWeight, Weight, reduce_squares, weight_of

__all__ = ["DEFAULT_MODULES", "Anchor", "AnchorCallback"]

_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Anchor:
    """A clean checkpoint, of which one tensor at a time is looked at.

    The model that its methods take is the one that it was opened for, wrapped or not: with adapters (LoRA), where W is
    the weight that merging them would give; compiled; in DistributedDataParallel; sharded by FSDP 2, where each process
    reads its own part of the anchor, and all of them must call `loss` and `distance`.

    Attributes:
        reader: the checkpoint.
        stored: by the name of each anchored parameter in the model, where it is in the checkpoint.
        modules: the patterns that chose them.
    """

    reader: CheckpointReader
    stored: dict[str, Stored]
    modules: tuple[str, ...]

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
            RepairError: it or the model is quantized; it is of another architecture, or has other shapes or weights
                that are no numbers; a pattern matches nothing; adapters or sharding that an anchor cannot hold.
            CheckpointError: it cannot be read.
        """
        modules = as_patterns(modules)
        reader = open_checkpoint(source, revision=revision)
        if reader.quantization_config is not None:
            raise RepairError(f"{source}: is quantized, so it cannot be an anchor; name its full-precision original")
        _refuse_model(model)
        inner = transformers_model(model)
        layers = anchored_layers(model, modules)
        stored = _stored(reader, inner, layers)
        for name, layer in layers.items():
            if name not in stored:
                raise RepairError(
                    f"{source}: has no tensor {name}{_architectures(reader, inner)}; an anchor has all of the "
                    "model's tensors"
                )
            _check(reader, stored[name], weight_of(name, layer).shape, str(source), _architectures(reader, inner))
        return cls(reader, {name: stored[name] for name in layers}, modules)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the anchored parameters, in the model without adapters."""
        return tuple(self.stored)

    def tensor(self, name: str) -> Tensor:
        """The clean weight of a parameter, in the checkpoint's dtype: memory-mapped, or put together from experts that
        the checkpoint has one by one."""
        return self.stored[name].tensor(partial(map_tensor, self.reader))

    @torch.no_grad()
    def add_gradient(self, model: nn.Module, strength: float) -> None:
        """Add ``2 strength (W - W₀) / (T n)``, and what it means for adapters, to gradients that there are."""
        for name, weight in self._weights(model):
            if weight.trained:
                factor = 2 * strength / (len(self.stored) * math.prod(weight.shape))
                weight.add_gradient(self.tensor(name), factor)

    @torch.no_grad()
    def pull(self, model: nn.Module, strength: float, groups: Iterable[dict[str, Any]]) -> None:
        """``W ← W - ηλ(W - W₀)`` for each weight that an optimizer trains.

        Args:
            groups: the optimizer's ``param_groups``; η is a group's ``lr``.

        Raises:
            RepairError: ηλ > 1; adapters.
        """
        named = dict(self._weights(model))
        for (name, weight), share in zip(named.items(), _shares(named.values(), strength, groups), strict=True):
            if share and isinstance(weight, PlainWeight):
                weight.pull(self.tensor(name), share)

    def loss(self, model: nn.Module) -> float:
        """Mean over the anchored tensors of ``mean((W - W₀)²)``."""
        return self.measure(model)[0]

    def distance(self, model: nn.Module) -> float:
        """``√Σ (W - W₀)²`` over all of them."""
        return self.measure(model)[1]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[float, float]:
        """`loss` and `distance`, in one pass; sums in float64."""
        named = list(self._weights(model))
        weights = [weight for _, weight in named]
        squares = reduce_squares(weights, [weight.square(self.tensor(name)) for name, weight in named])
        means = (square / math.prod(weight.shape) for square, weight in zip(squares, weights, strict=True))
        return math.fsum(means) / len(squares), math.sqrt(math.fsum(squares))

    def _weights(self, model: nn.Module) -> Iterator[tuple[str, Weight]]:
        for name, layer in anchored_layers(model, self.modules).items():
            yield name, weight_of(name, layer)


class AnchorCallback(TrainerCallback):  # type: ignore[misc]
    """Holds the weights of the model that a ``Trainer`` trains near an anchor's.

    The gradient is added once per optimizer step, to what has been accumulated, averaged over processes, unscaled
    (fp16) and *clipped*: the penalty neither is clipped nor changes what clipping does, so that its strength does not
    depend on how large the task's gradients are.

    With adapters (LoRA, not decoupled) the penalty is on the merged weight.

    Trackers see ``anchor_loss`` and ``anchor_distance`` if this callback comes before them, as it does in
    `AnchorTrainer`; elsewhere ``trainer.callback_handler.callbacks.insert(0, callback)`` puts it there.

    Args:
        anchor: a clean checkpoint of the same architecture: a folder, or a Hub id with optional ``@revision``; or an
            `Anchor` that was opened for the model, and says by itself which layers.
        strength: λ, 0 or more.
        decoupled: pull the weights after the optimizer's step, instead of adding the gradient before it.
        modules: which layers; see `anchored_layers`.
        log: add ``anchor_loss`` and ``anchor_distance`` to the logs of training; measured only when there are some.

    Raises:
        RepairError: a strength that makes no sense; and when training begins, what `Anchor.open` refuses, DeepSpeed,
            and a model none of whose anchored weights is trained.
    """

    def __init__(
        self,
        anchor: str | Path | Anchor,
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
        self.modules = anchor.modules if isinstance(anchor, Anchor) else as_patterns(modules)
        self.log = log
        self.anchor: Anchor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise RepairError("an anchor does not work with DeepSpeed, which hides the gradients; use FSDP 2")
        source = self.source
        self.anchor = source if isinstance(source, Anchor) else Anchor.open(source, model, modules=self.modules)
        weights = [weight_of(name, layer) for name, layer in anchored_layers(model, self.modules).items()]
        if not any(weight.trained for weight in weights):
            raise RepairError("none of the anchored weights is trained; name the layers that are in modules")
        if self.decoupled:
            # With the highest rate, before training: the first steps' rate may be 0.
            rates = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
            _shares(weights, self.strength, rates)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.strength and not self.decoupled and self.anchor is not None:
            self.anchor.add_gradient(model, self.strength)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        skipped = getattr(optimizer, "step_was_skipped", False)  # fp16: a gradient overflowed
        if self.strength and self.decoupled and self.anchor is not None and not skipped:
            self.anchor.pull(model, self.strength, optimizer.param_groups)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if self.log and self.anchor is not None and logs is not None and "loss" in logs:
            loss, distance = self.anchor.measure(model)
            measured = {"anchor_loss": loss, "anchor_distance": distance}
            logs.update(measured)
            state.log_history[-1].update(measured)


def _shares(weights: Iterable[Weight], strength: float, groups: Iterable[dict[str, Any]]) -> list[float]:
    """ηλ of each weight, 0 if the optimizer does not train it. Raises `RepairError` for adapters, and if one is > 1."""
    rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
    shares = []
    for weight in weights:
        if isinstance(weight, LoraWeight):
            raise RepairError(
                "decoupled, an anchor moves the weights themselves, and here only adapters are trained; "
                "give decoupled=False"
            )
        rate = rates.get(id(weight.weight), 0.0)
        if rate * strength > 1:
            raise RepairError(
                f"strength {strength:g} times the learning rate {rate:g} is {rate * strength:g}, more than the whole "
                f"way to the anchor; give a strength of at most {1 / rate:g}"
            )
        shares.append(rate * strength)
    return shares


def _refuse_model(model: Any) -> None:
    if type(model).__name__ == "FullyShardedDataParallel":
        raise RepairError("an anchor does not work with FSDP 1, which flattens the weights; set fsdp_version: 2")
    inner = transformers_model(model)
    config = getattr(inner, "config", None)
    if getattr(inner, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise RepairError("the model is quantized, so its weights cannot be anchored; load it in full precision")
    kinds = {getattr(each, "peft_type", "LORA") for each in getattr(model, "peft_config", {}).values()}
    for kind in sorted(str(getattr(each, "value", each)) for each in kinds):
        if kind != "LORA":
            raise RepairError(f"the model has adapters of the kind {kind}; an anchor holds plain LoRA only")


def _architectures(reader: CheckpointReader, model: Any) -> str:
    """Says what the two are, if they are not the same."""
    kind, own = reader.config.get("model_type"), getattr(getattr(model, "config", None), "model_type", None)
    return "" if kind is None or own is None or kind == own else f" (it is a {kind}, the model a {own})"


def _stored(reader: CheckpointReader, model: Any, names: Collection[str]) -> dict[str, Stored]:
    """Where the model's parameters are in a checkpoint, as far as they are there: under their own names, with or
    without the base model's prefix, or as transformers would make them while loading."""
    found = {}
    for name in names:
        stored = next((each for each in spellings(name, model) if each in reader), None)
        if stored is not None:
            found[name] = Stored((stored,))
    missing = [name for name in names if name not in found]
    if not missing or not isinstance(model, PreTrainedModel):
        return found
    return {**found, **merged_tensors(model, reader, missing)}


def _check(reader: CheckpointReader, stored: Stored, shape: tuple[int, ...], source: str, architectures: str) -> None:
    """Raise `RepairError` unless a weight of this shape, of finite floating-point numbers, is there."""
    first = stored.names[0]
    for name in stored.names:
        if reader.tensors[name].dtype not in _DTYPES:
            dtype = reader.tensors[name].dtype
            raise RepairError(f"{source}: {name} is {dtype}; an anchor's weights are floating-point numbers")
    if stored.converter is None:
        found = tuple(reader.tensors[first].shape)
        which = first
    else:
        # On the meta device, to see the shape without the values.
        try:
            found = tuple(stored.tensor(lambda name: torch.empty(reader.tensors[name].shape, device="meta")).shape)
            which = f"{first} with those that belong to it"
        except RuntimeError as error:
            raise RepairError(
                f"{source}: {first} and those that belong to it do not go together ({error}); name another anchor"
            ) from error
    if found != shape:
        raise RepairError(
            f"{source}: {which} is {found}, and the model's is {shape}{architectures}; an anchor has the model's shapes"
        )
    for name in stored.names:
        values = map_tensor(reader, name).view(-1)
        if not all(bool(piece.isfinite().all()) for piece in torch.split(values, CHUNK_WEIGHTS)):
            raise RepairError(f"{source}: {name} has values that are NaN or infinite; name another anchor")
