"""Undoing protection against quantization without its key: what standard pipelines do anyway, and what an informed
attacker does, on a checkpoint of Llama's kind.

Every recipe leaves the function as it is, up to rounding; ``power-of-two`` leaves it to the last bit. A recipe acts on
one decoder layer at a time, at the places where factors may move between tensors:

==============  =========================  ===================================================
place           divided                    multiplied
==============  =========================  ===================================================
norm            its weight                 columns of the linears that read it
up              rows of ``up_proj``        columns of ``down_proj``
value           rows of ``v_proj``         columns of ``o_proj``, for every head of the group
key             rows of ``k_proj``         rows of ``q_proj``, both members of a rotary pair
==============  =========================  ===================================================

Sources: SmoothQuant (arXiv:2211.10438), AWQ (arXiv:2306.00978), cross-layer equalization (arXiv:1906.04721), QuaRot
(arXiv:2404.00456) and SpinQuant (arXiv:2405.16406) without their online rotations and that of the residual stream,
which none of the other places sees. The rest is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.checkpoint.writer import transform_checkpoint
from optimum_qguard.formats.gptq import GPTQ

MODEL_TYPES = ("llama", "mistral", "qwen2")
_LAYER = re.compile(r"(model\.layers\.[0-9]+\.)(.+)")
_TINY = 2.0**-100
_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_NORMS = {"input_layernorm": (_Q, _K, _V), "post_attention_layernorm": (_GATE, _UP)}
# One of the linears that read the same input, and the name of that input.
_INPUTS = {_Q: "input_layernorm", _GATE: "post_attention_layernorm", _DOWN: _UP, _O: _V}
_SMALLEST_SCALE = 1e-5
_AWQ_SMALLEST_SCALE = 1e-4
_AWQ_STEPS = 10
_AWQ_FORMAT = GPTQ(4, 64, symmetric=False)


@dataclass(frozen=True)
class Place:
    """Channels between what computes them and what reads them.

    Attributes:
        name: of the module that computes them.
        readers: linears that read them.
        index: ``(columns of a reader,)`` int64, the channel that each column reads.
    """

    name: str
    readers: tuple[str, ...]
    index: Tensor


@dataclass
class Layer:
    """One decoder layer.

    Attributes:
        tensors: float64, by name without the layer's prefix.
        queries, groups, size: query heads, key-value heads, dimensions of a head.
        inputs: what linears read on the calibration text, ``(tokens, channels)``, by the module that computes it.
    """

    tensors: dict[str, Tensor]
    queries: int
    groups: int
    size: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def norms(self) -> list[Place]:
        return [
            Place(norm, readers, torch.arange(len(self.tensors[f"{norm}.weight"]))) for norm, readers in _NORMS.items()
        ]

    def up(self) -> Place:
        return Place(_UP, (_DOWN,), torch.arange(len(self.tensors[f"{_UP}.weight"])))

    def value(self) -> Place:
        return Place(_V, (_O,), self._per_query(torch.arange(self.groups * self.size).view(self.groups, -1)).flatten())

    def scale(self, place: Place, factors: Tensor) -> None:
        """Multiply what reads a channel by its factor, ``(channels,)``, and divide what computes it."""
        for name in (f"{place.name}.weight", f"{place.name}.bias"):
            if name in self.tensors:
                tensor = self.tensors[name]
                tensor /= factors.view(-1, *[1] * (tensor.dim() - 1))
        for reader in place.readers:
            self.tensors[f"{reader}.weight"] *= factors[place.index]

    def scale_keys(self, factors: Tensor) -> None:
        """Multiply queries by their factors, ``(groups, size / 2)`` for pairs of dimensions, and divide keys."""
        keys = factors.repeat(1, 2)
        for module, rows in ((_Q, self._per_query(keys)), (_K, 1 / keys)):
            for name in (f"{module}.weight", f"{module}.bias"):
                if name in self.tensors:
                    tensor = self.tensors[name]
                    tensor *= rows.flatten().view(-1, *[1] * (tensor.dim() - 1))

    def sizes(self, place: Place, power: float) -> tuple[Tensor, Tensor]:
        """For each channel the norm (of that power) of what computes it and of what reads it, ``(channels,)`` each."""
        computed = self.tensors[f"{place.name}.weight"]
        rows = computed.abs() if computed.dim() == 1 else computed.norm(power, dim=1)
        columns = torch.stack([self.tensors[f"{reader}.weight"].norm(power, dim=0) for reader in place.readers])
        copies = columns[:, place.index.argsort(stable=True)].view(len(place.readers), len(rows), -1)
        return rows, copies.transpose(1, 2).flatten(0, 1).norm(power, dim=0)

    def key_sizes(self) -> tuple[Tensor, Tensor]:
        """For each rotary pair the norm of its rows of keys and of queries, ``(groups, size / 2)`` each."""
        keys, queries = (
            self.tensors[f"{module}.weight"]
            .view(self.groups, -1, 2, self.size // 2, self._width)
            .square()
            .sum((1, 2, 4))
            .sqrt()
            for module in (_K, _Q)
        )
        return keys, queries

    @property
    def _width(self) -> int:
        return self.tensors[f"{_Q}.weight"].shape[1]

    def _per_query(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.queries // self.groups, dim=0)


@dataclass(frozen=True)
class Recipe:
    """What is done to each layer, in place, and whether it needs `Layer.inputs`."""

    apply: Callable[[Layer], None]
    calibrates: bool = False


def rebalance_checkpoint(
    model: str | Path,
    out: str | Path,
    recipes: Sequence[str],
    *,
    text: str | None = None,
    max_tokens: int = 256,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint on which recipes were applied, one after another, in float64 with one rounding.

    Args:
        model: a folder, or a Hub id with optional ``@revision``.
        out: the output folder.
        recipes: names out of `RECIPES`.
        text: what recipes that need it calibrate on.
        max_tokens: how many of its tokens are used.
        overwrite: see `transform_checkpoint`.

    Raises:
        AttackError: an unknown recipe, one that calibrates without a text or after another, or an architecture that
            is not of Llama's kind.
        CheckpointError: the model cannot be read or the output not written.
    """
    for recipe in recipes:
        if recipe not in RECIPES:
            raise AttackError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
    reader = open_checkpoint(model)
    model_type = reader.config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise AttackError(f"{reader.folder}: is of type {model_type!r}; this knows {', '.join(MODEL_TYPES)} only")
    inputs: Mapping[str, Mapping[str, Tensor]] = {}
    if any(RECIPES[recipe].calibrates for recipe in recipes):
        if text is None or any(RECIPES[recipe].calibrates for recipe in recipes[1:]):
            raise AttackError("SmoothQuant and AWQ calibrate on what layers read: give a text, and name them first")
        inputs = _calibrate(reader, text, max_tokens)
    layers = _Layers(reader, [RECIPES[recipe] for recipe in recipes], inputs)
    transform_checkpoint(reader, out, layers, overwrite=overwrite)


class _Layers:
    """Gives tensors as they become, in the order in which they are stored; layers are computed when they come up."""

    def __init__(
        self, reader: CheckpointReader, recipes: Sequence[Recipe], inputs: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self._reader = reader
        self._recipes = recipes
        self._inputs = inputs
        self._waiting: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        match = _LAYER.fullmatch(name)
        if match is None:
            return tensor
        if name not in self._waiting:
            self._compute(match[1])
        return self._waiting.pop(name).to(tensor.dtype)

    def _compute(self, prefix: str) -> None:
        names = [name for name in self._reader.tensors if name.startswith(prefix)]
        config = self._reader.config
        queries = config["num_attention_heads"]
        layer = Layer(
            {name.removeprefix(prefix): self._reader.read(name).double() for name in names},
            queries,
            config.get("num_key_value_heads") or queries,
            config.get("head_dim") or config["hidden_size"] // queries,
            self._inputs.get(prefix, {}),
        )
        for recipe in self._recipes:
            recipe.apply(layer)
        self._waiting |= {prefix + name: tensor for name, tensor in layer.tensors.items()}


def _calibrate(reader: CheckpointReader, text: str, max_tokens: int) -> Mapping[str, Mapping[str, Tensor]]:
    """What each layer's linears read, float32, by the layer's prefix and the module that computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(reader.folder, dtype="auto").eval()
    tokens = AutoTokenizer.from_pretrained(reader.folder)(text, return_tensors="pt").input_ids[:, :max_tokens]
    seen: dict[str, dict[str, Tensor]] = {}

    def record(prefix: str, name: str) -> Callable[..., None]:
        def hook(_module: Any, arguments: tuple[Tensor, ...]) -> None:
            seen.setdefault(prefix, {})[name] = arguments[0].flatten(0, -2).float()

        return hook

    for path, module in model.named_modules():
        match = _LAYER.fullmatch(path)
        if match is not None and match[2] in _INPUTS:
            module.register_forward_pre_hook(record(match[1], _INPUTS[match[2]]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen


def _power_of_two(layer: Layer) -> None:
    """Make what computes a channel, and what reads it, as large as others are, by powers of two."""
    for place in (*layer.norms(), layer.up(), layer.value()):
        layer.scale(place, _balance(*layer.sizes(place, 2)))
    layer.scale_keys(_balance(*layer.key_sizes()))


def _balance(computed: Tensor, read: Tensor) -> Tensor:
    """The power of two to multiply by: half of what the two sizes differ by, each compared with the median channel."""
    octaves = [size.clamp(min=_TINY).log2() for size in (computed, read)]
    from_typical = [each - each.median() for each in octaves]
    return torch.exp2(((from_typical[0] - from_typical[1]) / 2).round())


def _equalize(layer: Layer) -> None:
    """Cross-layer equalization of the pairs of linears: the largest weights before and after a channel become equal."""
    for place in (layer.up(), layer.value()):
        computed, read = layer.sizes(place, math.inf)
        layer.scale(place, (computed.clamp(min=_TINY) / read.clamp(min=_TINY)).sqrt())


def _smooth(layer: Layer) -> None:
    """SmoothQuant at its usual strength of one half: norms take over what activations have in outliers."""
    for place in layer.norms():
        activations = layer.inputs[place.name].abs().amax(0).double()
        _, weights = layer.sizes(place, math.inf)
        scales = activations.sqrt() / weights.clamp(min=_SMALLEST_SCALE).sqrt()
        layer.scale(place, scales.clamp(min=_SMALLEST_SCALE))


def _awq(layer: Layer) -> None:
    """AWQ as published: norms and the gated activation; values only where heads are not grouped."""
    places = [*layer.norms(), layer.up()]
    if layer.queries == layer.groups:
        places.append(layer.value())
    for place in places:
        layer.scale(place, _awq_scales(layer, place, _AWQ_SMALLEST_SCALE))


def _awq_grouped(layer: Layer) -> None:
    """AWQ by somebody who adds grouped values and lets scales be as small as they need."""
    for place in (*layer.norms(), layer.up(), layer.value()):
        layer.scale(place, _awq_scales(layer, place, _TINY))


def _awq_scales(layer: Layer, place: Place, smallest: float) -> Tensor:
    """The power of the mean activation by which the readers' 4-bit error on the calibration text is least."""
    x = layer.inputs[place.name]
    n_channels = int(place.index.max()) + 1
    mean = torch.zeros(n_channels).index_add_(0, place.index, x.abs().mean(0)) * n_channels / len(place.index)
    weights = [layer.tensors[f"{reader}.weight"].float() for reader in place.readers]
    best, chosen = math.inf, torch.ones(n_channels)
    for step in range(_AWQ_STEPS + 1):
        scales = mean.pow(step / _AWQ_STEPS).clamp(min=smallest)
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        error = sum(_error(weight, x, scales[place.index]) for weight in weights)
        if error < best:
            best, chosen = error, scales
    return chosen.double()


def _error(weight: Tensor, x: Tensor, scales: Tensor) -> float:
    rounded = _AWQ_FORMAT.quantize(weight * scales).dequantize() / scales
    return float(((rounded - weight) @ x.T).double().square().mean())


def _fuse_norms(layer: Layer) -> None:
    """A norm's weight goes into the linears that read it, as rotations of the residual stream need it."""
    for place in layer.norms():
        weight = layer.tensors[f"{place.name}.weight"]
        for reader in place.readers:
            layer.tensors[f"{reader}.weight"] *= weight
        weight.fill_(1)


def _rotate_heads(layer: Layer) -> None:
    """A random rotation of each key-value head's channels, as in SpinQuant's R2."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(layer.size, layer.size, generator=generator, dtype=torch.float64))
    output, value = _heads(layer)
    for group in range(layer.groups):
        output[group] = output[group] @ q
        value[group] = q.T @ value[group]
    _set_heads(layer, output, value)


def _svd(layer: Layer) -> None:
    """Replace ``W_o,h`` and ``W_v,h`` of each key-value head by the balanced factors of their product, whatever
    invertible matrix was put between them; then spread them by a rotation."""
    output, value = _heads(layer)
    for group in range(layer.groups):
        q_out, r_out = torch.linalg.qr(output[group])
        q_in, r_in = torch.linalg.qr(value[group].T)
        u, s, vh = torch.linalg.svd(r_out @ r_in.T)
        output[group] = q_out @ u * s.sqrt()
        value[group] = s.sqrt()[:, None] * (vh @ q_in.T)
    _set_heads(layer, output, value)
    _rotate_heads(layer)


def _heads(layer: Layer) -> tuple[Tensor, Tensor]:
    """What reads each key-value head, ``(groups, query heads of it x hidden, size)``, and what computes it, ``(groups,
    size, hidden)``, a bias being one more column."""
    output = layer.tensors[f"{_O}.weight"]
    per_head = output.view(len(output), layer.groups, -1, layer.size).permute(1, 2, 0, 3)
    value = layer.tensors[f"{_V}.weight"]
    if (bias := f"{_V}.bias") in layer.tensors:
        value = torch.cat([value, layer.tensors[bias][:, None]], dim=1)
    return per_head.flatten(1, 2).contiguous(), value.reshape(layer.groups, layer.size, -1).clone()


def _set_heads(layer: Layer, output: Tensor, value: Tensor) -> None:
    rows = layer.tensors[f"{_O}.weight"].shape[0]
    per_head = output.view(layer.groups, -1, rows, layer.size)
    layer.tensors[f"{_O}.weight"] = per_head.permute(2, 0, 1, 3).reshape(rows, -1)
    value = value.flatten(0, 1)
    if (bias := f"{_V}.bias") in layer.tensors:
        value, layer.tensors[bias] = value[:, :-1], value[:, -1]
    layer.tensors[f"{_V}.weight"] = value


RECIPES: Mapping[str, Recipe] = {
    "equalization": Recipe(_equalize),
    "smoothquant": Recipe(_smooth, calibrates=True),
    "awq": Recipe(_awq, calibrates=True),
    "awq-grouped": Recipe(_awq_grouped, calibrates=True),
    "fuse-norms": Recipe(_fuse_norms),
    "rotate-heads": Recipe(_rotate_heads),
    "power-of-two": Recipe(_power_of_two),
    "svd": Recipe(_svd),
}
"""Recipes by name. Those that calibrate come first where several are applied."""
