"""Which weights an anchor holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from optimum_qguard.repair.errors import RepairError

DEFAULT_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of the paper. In a model that lacks one of them (GPT-2, Phi-3, OPT) they stand for all linear layers
of its base model."""

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


def anchored_modules(model: nn.Module, modules: Sequence[str] = DEFAULT_MODULES) -> dict[str, nn.Module]:
    """The linear layers that patterns name, by their names in the model of transformers.

    Args:
        model: any model of transformers, also wrapped by peft, torch.compile, DistributedDataParallel or FSDP 2.
        modules: a pattern is a component of a module's dotted name (``"q_proj"``), or, with ``*``, ``?`` or ``[``, what
            the whole name must match (``"model.layers.0.*"``). What is matched are linear layers, but the output head.

    Returns:
        Layers of torch or transformers (``Conv1D``), or peft's around them.

    Raises:
        RepairError: a pattern that no linear layer matches.
    """
    inner = transformers_model(model)
    linear = dict(_linear_layers(inner))
    counts = {pattern: sum(_matches(pattern, name) for name in linear) for pattern in modules}
    if all(counts.values()):
        found = {name: layer for name, layer in linear.items() if any(_matches(pattern, name) for pattern in modules)}
    elif tuple(modules) == DEFAULT_MODULES:
        prefix = getattr(inner, "base_model_prefix", "")
        base = f"{prefix}." if prefix and hasattr(inner, prefix) else ""
        found = {name: layer for name, layer in linear.items() if name.startswith(base)}
    else:
        missing = next(pattern for pattern, count in counts.items() if count == 0)
        example = next(iter(linear), "q_proj").rpartition(".")[2]
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


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for full_name, module in model.named_modules():
        parts = [part for part in full_name.split(".") if part not in _WRAPPERS]
        if parts[-1] == "base_layer" or any(part.startswith("lora_") for part in parts):
            continue
        base = getattr(module, "base_layer", module)
        if isinstance(base, (nn.Linear, Conv1D)) and module is not output and base is not output:
            yield ".".join(parts), module


def _matches(pattern: str, name: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
