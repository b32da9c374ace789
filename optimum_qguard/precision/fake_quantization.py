"""Training as if weights were quantized: rounded in the forward pass, straight through in the backward pass.

layers = FakeQuantization(model)
with layers.at(4):
    model(**batch).loss.backward()
layers.remove()

The weights themselves stay as they are, so what is saved is a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.precision.bitmap import check_bits, matches
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import linear_layers, output_head


def fake_quantize(weight: Tensor, bits: int, *, group_size: int | None = None, symmetric: bool = True) -> Tensor:
    """Weights rounded to the nearest of 2^b symbols (one less if symmetric); gradients pass as if they were not.

    Symmetric: ``s = max|w| / (2^(b−1) − 1)``, ``q = round(w / s)``, ``ŵ = s·q``. Asymmetric: ``s = (max(w, 0) −
    min(w, 0)) / (2^b − 1)``, ``z = round(−min(w, 0) / s)``, ``q = clamp(round(w / s) + z, 0, 2^b − 1)``,
    ``ŵ = s·(q − z)``. Backward: ``∂L/∂w = ∂L/∂ŵ`` (Bengio et al., 2013).

    Args:
        weight: ``(out_features, in_features)``, any floating dtype; the result has the same.
        bits: 2 to 8.
        group_size: how many neighbouring weights of a row share a scale; a row's last group may be shorter. ``None``: a
            row has one.
        symmetric: which of the two grids.

    Raises:
        PrecisionError: bits out of range, or a group size below 1.
    """
    check_bits(bits, "fake quantization")
    _check_group_size(group_size)
    quantized: Tensor = _Rounding.apply(weight, bits, group_size, symmetric)  # type: ignore[no-untyped-call]
    return quantized


def quantize_gradient(gradient: Tensor, bits: int) -> Tensor:
    """``s·round(g / s)`` with ``s = max|g| / (2^(b−1) − 1)`` for each vector of the last dimension (one token's)."""
    return _symmetric(_exact(gradient), bits).to(gradient.dtype)


class FakeQuantization:
    """Linear layers of a model that compute with rounded weights, at a width that can be changed at any time.

    What is rounded: the weights of the layers, in the forward pass, by `fake_quantize`; and in the backward pass, while
    weights are rounded, the gradient of each layer's output, by `quantize_gradient`, before the gradients of its input
    and weight are computed from it. Activations, biases, embeddings and the other layers stay as they are.

    ``nn.Linear`` and transformers' ``Conv1D`` can be rounded, also under peft's adapters, which stay as they are.

    Attributes:
        names: the layers, in the model's order.

    Args:
        model: at full precision.
        bits: the width to begin with; ``None`` is full precision.
        modules: patterns of module names as in a `BitMap`; ``None``: all linear layers but the output head.
        group_size, symmetric: see `fake_quantize`.
        backward_bits: 2 to 8, of the gradients; ``None`` leaves them as they are.

    Raises:
        PrecisionError: widths out of range; a pattern that matches no linear layer; a model that has none, or whose
            weights are quantized already; a layer whose forward is not torch's or transformers' own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int | None = None,
        modules: Sequence[str] | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
        backward_bits: int | None = 8,
    ) -> None:
        check_bits(bits, "fake quantization", or_none=True)
        check_bits(backward_bits, "the backward pass", or_none=True)
        _check_group_size(group_size)
        self._quantize = partial(fake_quantize, group_size=group_size, symmetric=symmetric)
        self._backward_bits = backward_bits
        self._bits = bits
        self._layers = _chosen(model, modules)
        for name, layer in self._layers.items():
            _check_layer(name, layer)
        for layer in self._layers.values():
            layer.forward = partial(self._forward, layer)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._layers)

    @property
    def bits(self) -> int | None:
        """The width that layers compute with now; ``None`` is full precision. Can be set.

        Raises:
            PrecisionError: a width out of range.
        """
        return self._bits

    @bits.setter
    def bits(self, bits: int | None) -> None:
        check_bits(bits, "fake quantization", or_none=True)
        self._bits = bits

    @contextmanager
    def at(self, bits: int | None) -> Iterator[None]:
        """Compute with that width inside a ``with`` block.

        Raises:
            PrecisionError: a width out of range.
        """
        before, self.bits = self.bits, bits
        try:
            yield
        finally:
            self.bits = before

    def remove(self) -> None:
        """Give the layers their own forward back; nothing else of them was changed. Can be called again."""
        for layer in self._layers.values():
            vars(layer).pop("forward", None)
        self._layers = {}

    def _forward(self, layer: Any, input: Tensor) -> Tensor:
        if self._bits is None:
            output: Tensor = type(layer).forward(layer, input)
            return output
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        output = nn.functional.linear(input, self._quantize(weight, self._bits), layer.bias)
        if self._backward_bits is not None:
            output = _GradientRounding.apply(output, self._backward_bits)  # type: ignore[no-untyped-call]
        return output


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, weight: Tensor, bits: int, group_size: int | None, symmetric: bool) -> Tensor:
        rows, columns = weight.shape
        group = columns if group_size is None else min(group_size, columns)
        # Zeros at the end of the last group move neither of its scales, because both grids have a zero.
        groups = nn.functional.pad(_exact(weight), (0, -columns % group)).reshape(rows, -1, group)
        rounded = _symmetric(groups, bits) if symmetric else _asymmetric(groups, bits)
        return rounded.reshape(rows, -1)[:, :columns].to(weight.dtype)

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0], None, None, None


class _GradientRounding(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, output: Tensor, bits: int) -> Tensor:
        context.bits = bits
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return quantize_gradient(gradients[0], context.bits), None


def _exact(values: Tensor) -> Tensor:
    """At least in float32: in 16 bits a quotient of 8 bits is rounded twice, and a range can be beyond float16's."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _symmetric(values: Tensor, bits: int) -> Tensor:
    scale = values.abs().amax(-1, keepdim=True) / float(2 ** (bits - 1) - 1)
    return (values / _nonzero(scale)).round() * scale


def _asymmetric(values: Tensor, bits: int) -> Tensor:
    least = values.amin(-1, keepdim=True).clamp(max=0)
    scale = (values.amax(-1, keepdim=True).clamp(min=0) - least) / float(2**bits - 1)
    zero_point = (-least / _nonzero(scale)).round()
    codes = ((values / _nonzero(scale)).round() + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers that are meant. Patterns see names without what peft puts around them."""
    adapters = _adapter_layers(model)
    linears = {name: layer for name, layer in linear_layers(model).items() if name not in adapters}
    if patterns is None:
        head = output_head(model)
        return {name: layer for name, layer in linears.items() if layer is not head}
    plain = {name: name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in linears}
    for pattern in patterns:
        if not any(matches(pattern, name) for name in plain.values()):
            raise PrecisionError(
                f"pattern {pattern!r} matches no linear layer; there are {', '.join(list(plain.values())[:3])} …"
            )
    return {
        name: layer for name, layer in linears.items() if any(matches(pattern, plain[name]) for pattern in patterns)
    }


def _adapter_layers(model: nn.Module) -> set[str]:
    """Names of what peft has put beside the layers that it wraps."""
    wrappers = [name for name, module in model.named_modules() if "base_layer" in dict(module.named_children())]
    return {
        name
        for wrapper in wrappers
        for name, _ in model.named_modules()
        if name.startswith(f"{wrapper}.") and not name.startswith(f"{wrapper}.base_layer")
    }


def _check_layer(name: str, layer: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    own: tuple[Callable[..., Any], ...] = (nn.Linear.forward, Conv1D.forward)
    if "forward" in vars(layer):
        raise PrecisionError(
            f"{name} has got another forward already: from another FakeQuantization, which remove() ends, or from "
            "accelerate's device map, without which the model has to be loaded"
        )
    if type(layer).forward not in own:
        raise PrecisionError(
            f"{name} is a {type(layer).__name__}, whose own forward would be lost; leave it out by patterns (modules=)"
        )


def _check_group_size(group_size: int | None) -> None:
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise PrecisionError(f"a group of {group_size!r} weights: needs at least one, or None for one scale a row")
