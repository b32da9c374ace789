"""`nest`: one 8-bit copy of each linear weight that serves every width from 8 down to 2 bits.

nest(model)
set_bits(model, 4)                       # no reload, nothing is quantized again
with random_bits(model, (4, 6, 8)):
    model.generate(**inputs)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import oriented, tied_weights
from optimum_qguard.precision.nested_codes import NestedCodes, check_weight, dequantize, encode, group_size_of, tiles
from optimum_qguard.precision.widths import Per, Switch

GROUP_SIZE = 128
Model = TypeVar("Model", bound=nn.Module)


class NestedLinear(nn.Module):
    """A linear layer that holds `NestedCodes` and computes with their top bits.

    The weight is decoded in every forward, to the input's dtype, and once more in the backward pass, at the width of
    the forward; it is kept nowhere. Gradients reach the input and the bias; the weight is constant.

    Attributes:
        codes, grid, line: see `NestedCodes`.
        bias: ``(out,)`` or ``None``.
        dtype: of `weight`, that of the original.
        name: in the model.
        switch: of the model.
    """

    codes: Tensor
    grid: Tensor
    line: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, codes: NestedCodes, bias: nn.Parameter | None, dtype: torch.dtype, *, name: str, switch: Switch
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.codes.shape
        self.register_buffer("codes", codes.codes)
        self.register_buffer("grid", codes.grid)
        self.register_buffer("line", codes.line)
        self.register_parameter("bias", bias)
        self.dtype, self.name, self.switch = dtype, name, switch

    @property
    def bits(self) -> int:
        """The width that a forward would have here and now."""
        return self.switch.width(self.name)

    @property
    def weight(self) -> Tensor:
        """``(out, in)``: the values that a forward would compute with here and now; writing to them changes nothing."""
        return self.dequantize(self.bits).to(self.dtype)

    @torch.no_grad()
    def dequantize(self, bits: int) -> Tensor:
        """``(out, in)`` float32: the values at one width."""
        return dequantize(self.codes, self.grid, self.line, bits)

    def forward(self, input: Tensor) -> Tensor:
        """``(…, in)`` to ``(…, out)``."""
        output: Tensor = _Linear.apply(input, self.bias, self.codes, self.grid, self.line, self.bits)  # type: ignore[no-untyped-call]
        return output

    def extra_repr(self) -> str:
        groups = self.grid.shape[-1]
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, groups={groups}"


class _Linear(torch.autograd.Function):
    """``input @ weight.T + bias`` with a weight that is decoded a few rows at a time, and again in the backward."""

    @staticmethod
    def forward(
        context: Any, input: Tensor, bias: Tensor | None, codes: Tensor, grid: Tensor, line: Tensor, bits: int
    ) -> Tensor:
        context.save_for_backward(codes, grid, line)
        context.bits, context.dtype = bits, input.dtype
        parts: list[Tensor] = []
        row = 0
        for tile in tiles(codes, grid, line, bits):
            own = None if bias is None else bias[row : row + len(tile)]
            parts.append(nn.functional.linear(input, tile.to(input.dtype), own))
            row += len(tile)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        gradient = gradients[0].to(context.dtype)
        of_input = of_bias = None
        if context.needs_input_grad[0]:
            # As a whole: sums over tiles would be rounded once for each of them.
            codes, grid, line = context.saved_tensors
            of_input = gradient @ dequantize(codes, grid, line, context.bits).to(context.dtype)
        if context.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_input, of_bias, None, None, None, None


def nest(
    model: Model,
    bits: int | BitMap | Mapping[str, int | None] | Iterable[tuple[str, int | None]] = 8,
    *,
    group_size: int | None = GROUP_SIZE,
) -> Model:
    """Replace linear layers (``Conv1D`` included) by `NestedLinear`, one after the other; return the same model.

    Args:
        model: at full precision, on one device.
        bits: the width to begin with, for all but the output head; or a bit map, which also says by ``None`` which
            layers stay as they are.
        group_size: at most so many weights of a row share a grid; the greatest divisor of the row is taken.
            ``None``: one grid per row.

    Raises:
        PrecisionError: nested or quantized already; nothing to nest; a bit map that does not fit the model; layers that
            share a weight or compute something of their own; rows that no group size divides; weights that are not
            finite. The model is then as it was.
    """
    from transformers import PreTrainedConfig

    bitmap = as_bitmap(bits)
    check_group_size(group_size)
    if nested_layers(model):
        raise PrecisionError(f"this {type(model).__name__} is nested already; use set_bits to change its widths")
    widths = layers_to_nest(model, bitmap)
    switch = Switch(widths)
    sizes = group_sizes(model, widths, group_size)
    # Before anything changes: a model that is half nested could be used for nothing.
    for name in widths:
        with _naming(name):
            check_weight(oriented(model.get_submodule(name)))
    for name, size in sizes.items():
        module = model.get_submodule(name)
        weight = oriented(module)
        put(model, name, NestedLinear(encode(weight, size), _bias(module), weight.dtype, name=name, switch=switch))
    attach(model, switch)
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        from optimum_qguard.precision.nested_config import NestedConfig  # which imports this file

        config.quantization_config = NestedConfig(bitmap, group_size=group_size)  # what save_pretrained writes
    return model


def as_bitmap(bits: int | BitMap | Mapping[str, int | None] | Iterable[tuple[str, int | None]]) -> BitMap:
    """A bit map of what `nest` takes.

    Raises:
        PrecisionError: see `BitMap`.
    """
    if isinstance(bits, BitMap):
        return bits
    return BitMap({"*": bits} if isinstance(bits, int) else bits)


def check_group_size(group_size: int | None) -> None:
    """Raise `PrecisionError` unless `nest` takes it."""
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise PrecisionError(f"group_size is {group_size!r}; it is a whole number from 1 on, or None for whole rows")


def layers_to_nest(model: nn.Module, bitmap: BitMap) -> dict[str, int]:
    """The layers that `nest` replaces, and their widths.

    Raises:
        PrecisionError: see `nest`.
    """
    widths = {name: bits for name, bits in bitmap.resolve(model).items() if bits is not None}
    if not widths:
        raise PrecisionError("the bit map leaves every layer as it is, so there is nothing to nest")
    _refuse_unlike_linear(model, widths)
    for one, other in tied_weights(model):
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in (one, other)]
        if owners[0] is not owners[1] and not widths.keys().isdisjoint(
            name.removesuffix(".weight") for name in (one, other)
        ):
            raise PrecisionError(
                f"{one} and {other} are one and the same tensor, which cannot be nested: give their layers null"
            )
    return widths


def group_sizes(model: nn.Module, names: Iterable[str], group_size: int | None) -> dict[str, int]:
    """How many weights of a row share a grid in each of these layers.

    Raises:
        PrecisionError: a layer whose rows cannot be divided so.
    """
    sizes = {}
    for name in names:
        with _naming(name):
            sizes[name] = group_size_of(oriented(model.get_submodule(name)).shape[1], group_size)
    return sizes


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """The layers that `nest` put there, by name in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set a layer in the place of the one that the model has under a dotted name, everywhere it is used."""
    before = model.get_submodule(name)
    for parent in model.modules():
        for child, module in list(parent._modules.items()):  # named_children() tells a layer in two places once
            if module is before:
                setattr(parent, child, layer)


def attach(model: nn.Module, switch: Switch) -> None:
    """Make each forward and each ``generate`` of the model keep the widths that it began with."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if module is model or isinstance(module, PreTrainedModel):
            module.nested_switch = switch  # type: ignore[assignment]
            module.forward = _Held(module, "forward", "forward")
            if hasattr(module, "generate"):
                module.generate = _Held(module, "generate", "request")  # type: ignore[assignment]


class _Held:
    """A method of a module that keeps the widths that it began with.

    An object and no closure, so that it is copied and pickled with its module: a copy calls itself, and asks its own
    switch.
    """

    def __init__(self, module: nn.Module, method: str, kind: Per) -> None:
        self._module, self._method, self._kind = module, method, kind
        self.__name__ = method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._original.__doc__

    @property
    def _original(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(type(self._module), self._method).__get__(self._module)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module
        if self._kind == "forward" and module.training and _recomputes(module):
            raise PrecisionError(
                "gradient checkpointing computes layers once more when the forward and its width are gone; disable it "
                "with model.gradient_checkpointing_disable()"
            )
        with module.nested_switch.call(self._kind):
            return self._original(*args, **kwargs)


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _refuse_unlike_linear(model: nn.Module, widths: Iterable[str]) -> None:
    for name, module in [("", model), *((name, model.get_submodule(name)) for name in widths)]:
        if "forward" in vars(module):
            raise PrecisionError(
                f"{name or type(model).__name__} has a forward that was put in place of its class's, as accelerate "
                "does to spread a model over devices; load it on one device, and nest it before anything else"
            )
    for name in widths:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            raise PrecisionError(
                f"{name} is a {type(module).__name__}, which computes something of its own: give it null"
            )


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    try:
        yield
    except PrecisionError as error:
        raise PrecisionError(f"{layer}: {error}") from error


def _bias(module: nn.Module) -> nn.Parameter | None:
    bias = module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias
