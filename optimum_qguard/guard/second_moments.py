"""The second moments of what a model's linear layers read, one layer at a time, from one forward pass.

All samples go through the model as one batch, so a layer's first call sees all there is to see: its second moment is
computed then and there, handed on, and dropped. What is in memory is the model, the batch's activations and one matrix
of ``in_features x in_features``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Visit = Callable[[str, nn.Module, Tensor], None]


class _Done(Exception):
    """Every layer was visited; the rest of the forward pass is not needed."""


@torch.no_grad()
def visit_second_moments(model: Any, names: Iterable[str], input_ids: Tensor, visit: Visit) -> None:
    """Call ``visit(name, layer, second_moment)`` for each linear layer when it is reached.

    A layer that is never reached (an expert that no token is routed to) is not visited, nor is one that sees nothing
    but zeros. Layers that read the same tensor, such as queries, keys and values, are given the same matrix object. A
    layer that is called several times is visited once, with what it saw first.

    Args:
        model: of transformers, in full precision, in evaluation mode.
        names: of the modules, each with an input of shape ``(..., in_features)``.
        input_ids: ``(n_sequences, n_tokens)`` int64 without padding, on the model's device.
        visit: gets ``E[x x^T]``, ``(in_features, in_features)`` float32 on the layer's device.
    """
    last: tuple[Any, Tensor | None] = (None, None)

    def reached(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal last
        hooks.pop(name).remove()
        if inputs[0] is not last[0]:
            last = inputs[0], _second_moment(inputs[0])
        if last[1] is not None:
            visit(name, module, last[1])
        if not hooks:
            raise _Done

    hooks = {name: model.get_submodule(name).register_forward_pre_hook(partial(reached, name)) for name in names}
    # The head's logits for a whole batch take more memory than anything else.
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    whole = not all(id(model.get_submodule(name)) in inside for name in hooks)
    try:
        _forward(model if whole else base, input_ids)
    except _Done:
        pass
    finally:
        for hook in hooks.values():
            hook.remove()


def _forward(model: Any, input_ids: Tensor) -> None:
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = input_ids
    model(**arguments)


def _second_moment(inputs: Tensor) -> Tensor | None:
    """``None`` for no inputs, or for inputs that are all zero."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    if not bool(rows.any()):
        return None
    return rows.T @ rows / len(rows)
