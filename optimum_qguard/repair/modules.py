"""Which weights an anchor holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from optimum_qguard.repair.errors import RepairError

DEFAULT_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of the paper. In a model that lacks one of them (GPT-2, Phi-3, OPT) they stand for all linear layers
of its base model."""

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
_LINEAR = "weight"
# Two matrices in one: by each of their names.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Layer:
    """What holds one weight: a linear layer, or the experts of a layer in one tensor.

    Attributes:
        module: of torch or transformers (``Linear``, ``Conv1D``, experts), or peft's around it.
        parameter: the weight's name in it.
    """

    module: nn.Module
    parameter: str = _LINEAR


def as_patterns(modules: Sequence[str]) -> tuple[str, ...]:
    """Patterns as a tuple; a string is one pattern, and not one for each of its letters."""
    return (modules,) if isinstance(modules, str) else tuple(modules)


def anchored_layers(model: nn.Module, modules: Sequence[str] = DEFAULT_MODULES) -> dict[str, Layer]:
    """The layers that patterns name, by the names of their weights in the model of transformers.

    Args:
        model: any model of transformers, also wrapped by peft, torch.compile, DistributedDataParallel or FSDP 2.
        modules: a pattern is a component of a layer's dotted name (``"q_proj"``), or, with ``*``, ``?`` or ``[``, what
            the whole name must match (``"model.layers.0.*"``). What is matched are linear layers, but the output head,
            and tensors in which transformers holds a layer's experts: ``experts.down_proj``, and
            ``experts.gate_up_proj``, which is matched by ``"gate_proj"`` and by ``"up_proj"`` too, as a whole.

    Raises:
        RepairError: a pattern that no layer matches.
    """
    inner = transformers_model(model)
    layers = dict(_layers(inner))
    names = {weight: _names(weight) for weight in layers}
    counts = {pattern: sum(_matches(pattern, each) for each in names.values()) for pattern in modules}
    if all(counts.values()):
        found = {
            weight: layer
            for weight, layer in layers.items()
            if any(_matches(pattern, names[weight]) for pattern in modules)
        }
    elif tuple(modules) == DEFAULT_MODULES:
        prefix = getattr(inner, "base_model_prefix", "")
        base = f"{prefix}." if prefix and hasattr(inner, prefix) else ""
        found = {weight: layer for weight, layer in layers.items() if weight.startswith(base)}
    else:
        missing = next(pattern for pattern, count in counts.items() if count == 0)
        example = next(iter(names.values()), ("q_proj",))[0].rpartition(".")[2]
        raise RepairError(
            f"no linear layer matches {missing!r}; give a part of a layer's name, such as {example!r}, or a pattern "
            "with * for the whole name"
        )
    if not found:
        raise RepairError("the model has no linear layers to anchor")
    return found


def transformers_model(model: nn.Module) -> Any:
    """What is inside the wrappers around a whole model."""
    inner: Any = model
    while True:
        if type(inner).__name__ == "DistributedDataParallel":
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def _layers(model: Any) -> Iterator[tuple[str, Layer]]:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for full_name, module in model.named_modules():
        parts = [part for part in full_name.split(".") if part not in _WRAPPERS]
        if parts[-1] == "base_layer" or any(part.startswith("lora_") for part in parts):
            continue
        name, base = ".".join(parts), module
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if isinstance(base, (nn.Linear, Conv1D)):
            if module is not output and base is not output:
                yield f"{name}.{_LINEAR}", Layer(module)
        elif "Experts" in type(base).__name__:
            for parameter, weight in base.named_parameters(recurse=False):
                if weight.ndim == 3:
                    yield f"{name}.{parameter}", Layer(module, parameter)


def _names(weight: str) -> tuple[str, ...]:
    """What patterns may call the layer that has a weight."""
    name = weight.removesuffix(f".{_LINEAR}")
    before, _, last = name.rpartition(".")
    return (name, *(f"{before}.{each}" for each in _FUSED.get(last, ())))


def _matches(pattern: str, names: tuple[str, ...]) -> bool:
    if any(sign in pattern for sign in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(f".{pattern}." in f".{name}." for name in names)
