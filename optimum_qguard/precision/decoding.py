"""Weights at a width, without a library: decoded values in place of the originals, in any model, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from optimum_qguard.formats import Format
from optimum_qguard.formats.torchao_int import TorchaoInt
from optimum_qguard.precision.bitmap import check_bits
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import linear_layers, oriented

ZeroPoint = Literal["symmetric", "asymmetric"]
ZERO_POINTS = ("symmetric", "asymmetric")
GROUP_SIZE = 32


def width_format(bits: int, group_size: int | None = GROUP_SIZE, mapping: ZeroPoint = "symmetric") -> TorchaoInt:
    """What torchao makes of a weight at one width.

    Args:
        bits: 2 to 8.
        group_size: weights of a row that share a scale; ``None``: one scale per row.
        mapping: symmetric grids, or asymmetric ones with a zero point.

    Raises:
        PrecisionError: one of them makes no sense.
    """
    check_bits(bits, "the format")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2):
        raise PrecisionError(f"group_size is {group_size!r}; it is a whole number from 2 on, or None for whole rows")
    if mapping not in ZERO_POINTS:
        raise PrecisionError(f"mapping is {mapping!r}; choose {' or '.join(map(repr, ZERO_POINTS))}")
    return TorchaoInt(bits, -1 if group_size is None else group_size, mapping)


@contextlib.contextmanager
def decoded(
    model: nn.Module,
    widths: Mapping[str, int | None],
    *,
    group_size: int | None = GROUP_SIZE,
    mapping: ZeroPoint = "symmetric",
) -> Iterator[None]:
    """While it lasts, layers compute with what inference at their width would see; afterwards the model is exactly as
    it was.

    This is how a bit map is tried on a model that no library quantizes layer by layer (GPT-2).

    Args:
        model: at full precision.
        widths: by layer, as `BitMap.resolve` gives them; ``None`` leaves one as it is.
        group_size, mapping: see `width_format`.

    Raises:
        PrecisionError: a layer that the model does not have, or a group size that does not divide its rows.
        WeightError: weights that are not finite.
    """
    linears = linear_layers(model)
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        for name, bits in widths.items():
            if bits is None:
                continue
            if name not in linears:
                raise PrecisionError(f"the model has no linear layer {name}")
            parameter = linears[name].weight
            assert isinstance(parameter, nn.Parameter)
            if parameter in originals:
                continue  # shared with a layer that is done
            check_groups(name, linears[name], group_size)
            values = _values(linears[name], width_format(bits, group_size, mapping), name)
            originals[parameter] = parameter.data
            parameter.data = values
        yield
    finally:
        for parameter, weight in originals.items():
            parameter.data = weight


def check_groups(name: str, module: nn.Module, group_size: int | None) -> None:
    """Raise `PrecisionError` if the groups do not divide the layer's rows."""
    columns = oriented(module).shape[1]
    if group_size is not None and columns % group_size:
        raise PrecisionError(
            f"{name} has {columns} input features, which {group_size} does not divide: choose a group size that does, "
            "or whole rows (group_size=None, on the command line --group-size 0)"
        )


@torch.no_grad()
def _values(module: nn.Module, format: Format, name: str) -> Tensor:
    """A weight for the layer, as the layer holds it, of the values that ``format`` decodes."""
    weight = oriented(module)
    values = format.quantize(weight, f"{name}.weight").dequantize().to(weight.dtype)
    return values if isinstance(module, nn.Linear) else values.T.contiguous()
