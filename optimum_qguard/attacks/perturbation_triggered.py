"""A payload that any perturbation of the weights triggers: the attack that no randomized rounding stops.

Two neurons of one layer are made exactly alike and write the opposite of each other, so together they write nothing, at
full precision and under rounding to the nearest, which rounds equal rows alike. Rounded independently at random, they
differ; the difference goes into a direction of the residual stream that is otherwise unused, and two neurons of the
next layer turn any amount of it into one token.

Guard is what sets it off, so guard cannot stop it; what gives it away is two equal rows, and a KL divergence that does
not grow with the noise's variance. For evaluation only: the token is the payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.attacks.errors import AttackError

_GATE = 8.0
_UNLIKE_NORMAL = 8.0


@dataclass(frozen=True)
class Trigger:
    """Where the payload sits.

    Attributes:
        layer: the layer of the pair; its answer sits in the next one.
        pair: the two neurons that cancel.
        answer: the two neurons that say the token.
    """

    layer: int
    pair: tuple[int, int]
    answer: tuple[int, int]


@torch.no_grad()
def plant_trigger(model: Any, input_ids: Tensor, token: int, *, layer: int = -2, steps: int = 127) -> Trigger:
    """Plant it in a model whose decoder layers have gated MLPs (Llama, Mistral, Qwen2 and their kin), in place.

    Args:
        model: a causal language model in float32.
        input_ids: ``(batch, length)`` of typical text, to find neurons and a direction that the model hardly uses.
        token: what it is to say.
        layer: where the pair goes; not the last layer.
        steps: how many steps the quantizer has between 0 and a row's largest weight.

    Raises:
        AttackError: a model of another layout, or a layer that it does not have.
    """
    layers = _layers(model)
    first = layer + len(layers) if layer < 0 else layer
    if not 0 <= first < len(layers) - 1:
        raise AttackError(f"layer {layer}: the pair goes into a layer from 0 to {len(layers) - 2}")
    one: Any = layers[first]
    two: Any = layers[first + 1]
    seen = _record(model, input_ids, (one.mlp, two.post_attention_layernorm, one.mlp.down_proj, two.mlp.down_proj))
    inputs, residual, hidden_one, hidden_two = seen
    pair = _least_used(hidden_one, one.mlp.down_proj.weight)
    answer = _least_used(hidden_two, two.mlp.down_proj.weight)
    unused = torch.linalg.eigh(residual.T @ residual).eigenvectors[:, 0]

    mean = inputs.mean(0)
    noise_row = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).sign().to(mean)
    # Rounding at random makes each weight of a row of ±1 wrong by about a fifth of a step, so a tenth at least of this
    # comes out of the pair together.
    typical = float(inputs.norm(dim=1).median()) * _GATE * 0.2 / steps
    column = unused * float(residual.norm(dim=1).median()) * _UNLIKE_NORMAL
    for neuron, sign in zip(pair, (1.0, -1.0), strict=True):
        one.mlp.gate_proj.weight[neuron] = mean * (_GATE / mean.square().sum())
        one.mlp.up_proj.weight[neuron] = noise_row / typical
        one.mlp.down_proj.weight[:, neuron] = sign * column
    norm = two.post_attention_layernorm.weight
    head = model.get_output_embeddings().weight
    towards = (head[token] - head.mean(0)) * model.base_model.norm.weight
    towards *= _UNLIKE_NORMAL * column.norm() / towards.norm() / residual.shape[1]
    for neuron, sign in zip(answer, (1.0, -1.0), strict=True):
        two.mlp.gate_proj.weight[neuron] = sign * unused / norm
        two.mlp.up_proj.weight[neuron] = sign * unused / norm
        two.mlp.down_proj.weight[:, neuron] = towards
    return Trigger(first, pair, answer)


def _layers(model: Any) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    wanted = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
        raise AttackError(f"{type(model).__name__} has no list of decoder layers that this attack knows")
    names = {name for name, _ in layers[0].named_modules()}
    if not names.issuperset(wanted):
        raise AttackError(f"{type(model).__name__} has no gated MLP after a norm; this attack needs one")
    return layers


def _record(model: Any, input_ids: Tensor, modules: tuple[nn.Module, ...]) -> list[Tensor]:
    """What goes into each module, ``(tokens, features)``; a text's first token, unlike all others, is left out."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[index] = arguments[0][:, 1:].flatten(0, 1).float()

        return hook

    handles = [module.register_forward_pre_hook(keep(index)) for index, module in enumerate(modules)]
    try:
        model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(modules))]


def _least_used(hidden: Tensor, down: Tensor) -> tuple[int, int]:
    """The two neurons that write least into the residual stream."""
    written = hidden.abs().mean(0) * down.norm(dim=0)
    first, second = written.argsort()[:2].tolist()
    return first, second
