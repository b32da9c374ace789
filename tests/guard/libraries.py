"""What the real libraries store: quantize one weight with them, and read symbols and values out of their modules."""

from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.formats import Format
from optimum_qguard.guard.backends import backend_of, preset

# Every preset that quantizes while loading on any machine; "bnb-nf4-double" is not a preset of its own.
ON_LOAD = [
    "bnb-int8",
    "bnb-nf4",
    "bnb-nf4-double",
    "bnb-fp4",
    "torchao-int8",
    "torchao-int4",
    "torchao-float8",
    "quanto-int8",
    "quanto-int4",
    "quanto-int2",
    "quanto-float8",
]


def library_config(name: str, **arguments: Any) -> Any:
    """The transformers configuration of `ON_LOAD`'s names."""
    if name == "bnb-nf4-double":
        return preset("bnb-nf4", bnb_4bit_use_double_quant=True, **arguments)
    return preset(name, **arguments)


def library_format(name: str) -> Format:
    config = library_config(name)
    return backend_of(config).format_of(config, nn.Linear(1, 1), "layer.weight")


@torch.no_grad()
def quantize_with_library(name: str, weight: Tensor) -> nn.Module:
    """The library's own linear module for a ``(out_features, in_features)`` weight."""
    config = library_config(name)
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight.copy_(weight)
    if name.startswith("torchao"):
        from torchao.quantization import quantize_

        quantize_(linear, config.quant_type)
        return linear
    if name.startswith("quanto"):
        from optimum.quanto import QLinear, qfloat8, qint2, qint4, qint8

        types = {"float8": qfloat8, "int8": qint8, "int4": qint4, "int2": qint2}
        quantized: nn.Module = QLinear.from_module(linear, weights=types[config.weights])
        quantized.freeze()
        return quantized
    import bitsandbytes as bnb

    if name == "bnb-int8":
        module = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        module.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
        return module
    module = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=config.bnb_4bit_quant_type)
    module.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    ).to("cpu")
    return module


@torch.no_grad()
def stored(module: nn.Module, format: Format, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """What a library's module holds for a weight of ``shape``: symbols, as indices into the format's alphabet (int64),
    and the values that it decodes (its dtype)."""
    symbols, values = _read(module, shape)
    symbols, values = symbols.reshape(shape).float(), values.reshape(shape)
    alphabet = format.grid(format.blocks(torch.ones(1, shape[-1]))).alphabet
    if hasattr(module.weight, "zero_point") and alphabet[0] == 0:
        symbols += len(alphabet) // 2  # torchao counts from the middle
    codes = (symbols.unsqueeze(-1) - alphabet).abs().argmin(-1)
    torch.testing.assert_close(alphabet[codes], symbols, rtol=1e-3, atol=1e-4)
    return codes, values


def _read(module: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    weight: Any = module.weight
    if type(weight).__name__ == "Int8Params":
        return weight.data, weight.data.float() * (weight.SCB / 127).unsqueeze(-1)
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        packed = weight.data.flatten()
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: shape.numel()]
        return weight.quant_state.code[nibbles.long()], dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "qdata"):
        return weight.qdata.float(), weight.dequantize()
    if type(weight).__name__.startswith("TinyGemm"):
        weight = weight.weight_qbits_tensor()
    data = weight._data
    return (data.unpack() if hasattr(data, "unpack") else data).float(), weight.dequantize()
