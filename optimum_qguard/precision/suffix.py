"""Run a model from one of its layers on: what comes before a layer that changes has to be computed only once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Suffix:
    """A causal model's logits for fixed tokens, of which only the layers from a given one on are computed anew.

    The inputs of all layers are kept from one pass of the model as it is. A pass from layer ``i`` on takes the first
    ``i`` out of the model's list of layers for as long as it lasts, and puts the kept input into layer ``i``. Whether
    that is right for a model is not assumed: before a layer's first use it must reproduce the logits of the whole model
    bit for bit, and otherwise passes begin at the first layer.

    Args:
        model: in evaluation mode, at full precision.
        tokens: ``(sequences, length)`` int64.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._parent, self._attribute, self._layers = _layer_list(model)
        self._inputs: dict[int, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(self._keeper(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        try:
            self.logits = self._run()
        finally:
            for hook in hooks:
                hook.remove()
        self._usable: dict[int, bool] = {0: True}

    def layer_of(self, module: nn.Module) -> int:
        """The index of the layer that a module is in; 0 for one outside."""
        return next((i for i, layer in enumerate(self._layers) if any(each is module for each in layer.modules())), 0)

    def run(self, first: int) -> Tensor:
        """``(sequences, length, vocabulary)`` logits, given that no weight before layer ``first`` has changed."""
        return self._run_from(first) if self._usable.get(first) else self._run()

    def prepare(self, first: int) -> None:
        """Find out whether passes may begin at layer ``first``; the model must be as it was in the beginning."""
        if first not in self._usable:
            try:
                self._usable[first] = torch.equal(self._run_from(first), self.logits)
            except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
                self._usable[first] = False

    def _keeper(self, index: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[index] = args[0] if args else kwargs["hidden_states"]

        return keep

    @torch.no_grad()
    def _run(self) -> Tensor:
        logits: Tensor = self._model(self._tokens, use_cache=False).logits
        return logits

    def _run_from(self, first: int) -> Tensor:
        if first == 0:
            return self._run()

        def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kept = self._inputs[first]
            return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

        hook = self._layers[first].register_forward_pre_hook(replace, with_kwargs=True)
        setattr(self._parent, self._attribute, nn.ModuleList(self._layers[first:]))
        try:
            return self._run()
        finally:
            hook.remove()
            setattr(self._parent, self._attribute, self._layers)


def _layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list that holds most of the model's weights, and where it is; an empty one if there is none."""
    lists = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    return max(lists, key=lambda found: _size(found[2]), default=(nn.Module(), "none", nn.ModuleList()))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
