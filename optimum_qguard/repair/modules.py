"""Which weights an anchor holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from optimum_qguard.repair.errors import RepairError

DEFAULT_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of the paper; all linear layers but the output head in models that call theirs otherwise."""


def anchored_modules(model: nn.Module, modules: Sequence[str] = DEFAULT_MODULES) -> dict[str, nn.Module]:
    """The linear layers that patterns name, by their names in the model.

    Args:
        model: any model of transformers, with adapters of peft or without.
        modules: a pattern is a component of a module's dotted name (``"q_proj"``), or, with ``*``, ``?`` or ``[``, what
            the whole name must match (``"model.layers.0.*"``). What is matched are linear layers.

    Raises:
        RepairError: a pattern that no linear layer matches.
    """
    linear = dict(_linear_layers(model))
    found = {name: layer for name, layer in linear.items() if any(_matches(pattern, name) for pattern in modules)}
    if not found and tuple(modules) == DEFAULT_MODULES:
        found = linear
    elif tuple(modules) != DEFAULT_MODULES:
        for pattern in modules:
            if not any(_matches(pattern, name) for name in linear):
                raise RepairError(
                    f"no linear layer matches {pattern!r}; name a part of one's name, such as "
                    f"{next(iter(linear), 'q_proj').rpartition('.')[2]!r}"
                )
    if not found:
        raise RepairError("the model has no linear layers to anchor")
    return found


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if ".lora_" in name or name.endswith((".base_layer", "lm_head")):
            continue
        base = getattr(module, "base_layer", module)
        if isinstance(base, (nn.Linear, Conv1D)) and module is not output and base is not output:
            yield name, module


def _matches(pattern: str, name: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
