"""GPTQ's, torchao's and quanto's integer formats against the libraries themselves."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import weights
from torch import Tensor, nn

from optimum_qguard.formats import Quantized, WeightError, get_format
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.formats.quanto_int import QuantoInt8, QuantoIntGroup
from optimum_qguard.formats.torchao_int import TorchaoInt, TorchaoInt4

BITS = st.integers(2, 8)
GROUPED = st.integers(1, 8).map(lambda groups: 32 * groups)
SIXTEENS = st.sampled_from([16, 32])
TORCHAO = st.one_of(
    st.builds(
        TorchaoInt,
        group_size=st.sampled_from([None, -1, 16, 32]),
        scale_dtype=st.just(torch.float32),
        eps=st.just(2.0**-23),
    ),
    st.builds(
        TorchaoInt,
        bits=BITS,
        group_size=st.sampled_from([-1, 16, 32]),
        mapping=st.sampled_from(["symmetric", "symmetric_no_clipping_err", "asymmetric"]),
        scale_dtype=st.sampled_from([None, torch.float32]),
    ),
)
TINYGEMM = st.builds(TorchaoInt4, group_size=st.just(32), eps=st.just(1e-6))
QUANTO = st.sampled_from([QuantoInt8(), QuantoIntGroup(4), QuantoIntGroup(2)])
GPTQS = st.builds(GPTQ, bits=BITS, group_size=st.sampled_from([-1, 32, 100]), symmetric=st.booleans())


def assert_same(quantized: Quantized, codes: Tensor, values: Tensor, weight: Tensor) -> None:
    """Symbols bit for bit, decoded values up to rounding in the weight's dtype."""
    assert torch.equal(quantized.codes.long(), codes.long())
    offset = quantized.grid.offset
    reach = quantized.format.blocks(weight).float().abs().amax(-1, keepdim=True)
    reach = reach if offset is None else reach + offset.abs()
    reach = quantized.format.unblock(reach.expand(quantized.block_codes.shape), weight.shape)
    tolerance = 4 * torch.finfo(weight.dtype).eps * reach + torch.finfo(weight.dtype).tiny
    assert ((quantized.dequantize() - values.float()).abs() <= tolerance).all()


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def gptqmodel(format: GPTQ, weight: Tensor) -> tuple[Tensor, Tensor]:
    quantizer_module = pytest.importorskip("gptqmodel.quantization.quantizer")
    quantizer = quantizer_module.Quantizer(SimpleNamespace(bits=format.bits, sym=format.symmetric, mse=0.0))
    quantizer.configure(perchannel=True)
    codes, values = [], []
    for group in weight.float().split(format.group_of(weight.shape), dim=1):
        quantizer.find_params(group, weight=True)
        value = quantizer.quantize(group)
        values.append(value)
        codes.append((value / quantizer.scale).round() + quantizer.zero)
    return torch.cat(codes, 1), torch.cat(values, 1)


@torch.no_grad()
def torchao(format: TorchaoInt | TorchaoInt4, weight: Tensor) -> tuple[Tensor, Tensor]:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

    layer = linear(weight)
    if isinstance(format, TorchaoInt4):
        quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=format.group_size))
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        values = layer(identity).t()
        layer.weight.scale_and_zero[..., 0], layer.weight.scale_and_zero[..., 1] = 1, 8
        return layer(identity).t(), values
    if format == get_format("torchao-int8"):
        quantize_(layer, Int8WeightOnlyConfig())
    elif format.eps is not None:
        granularity = PerTensor() if format.group_size is None else PerGroup(format.group_size)
        granularity = PerRow() if format.group_size == -1 else granularity
        quantize_(layer, Int8WeightOnlyConfig(granularity=granularity))
    else:
        granularity = PerAxis(0) if format.group_size == -1 else PerGroup(format.group_size)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{format.bits}"),
            granularity=granularity,
            mapping_type=MappingType[format.mapping.upper()],
            scale_dtype=format.scale_dtype,
        )
        quantize_(layer, config)
    return layer.weight.qdata.short() + 2 ** (format.bits - 1), layer.weight.dequantize()


@torch.no_grad()
def quanto(format: QuantoInt8 | QuantoIntGroup, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What ``freeze`` does, less the packing for one device's kernel."""
    from optimum.quanto import QLinear, qint2, qint4, qint8, quantize_weight

    bits = 8 if isinstance(format, QuantoInt8) else format.bits
    layer = QLinear.from_module(linear(weight), weights={8: qint8, 4: qint4, 2: qint2}[bits])
    arguments = {"qtype": layer.weight_qtype, "axis": 0}
    if bits == 8:
        stored = quantize_weight(weight, scale=layer.optimizer(weight, **arguments), optimized=False, **arguments)
        return stored._data.short() + 128, stored.dequantize()
    arguments["group_size"] = layer.weight_group_size
    scale, shift = layer.optimizer(weight, **arguments)
    stored = quantize_weight(weight, scale=scale, shift=shift, optimized=False, **arguments)
    return stored._data.unpack().reshape(weight.shape), stored.dequantize()


@given(GPTQS, weights())
def test_gptq_is_gptqmodels_grid(format: GPTQ, weight: Tensor) -> None:
    assert_same(format.quantize(weight), *gptqmodel(format, weight), weight)


@given(TORCHAO, weights(columns=GROUPED))
def test_torchao(format: TorchaoInt, weight: Tensor) -> None:
    assert_same(format.quantize(weight), *torchao(format, weight), weight)


@given(TINYGEMM, weights(SIXTEENS, GROUPED))
def test_torchao_tinygemm(format: TorchaoInt4, weight: Tensor) -> None:
    assert_same(format.quantize(weight), *torchao(format, weight), weight)


@given(QUANTO, weights())
def test_quanto(format: QuantoInt8 | QuantoIntGroup, weight: Tensor) -> None:
    assert_same(format.quantize(weight), *quanto(format, weight), weight)


@given(TORCHAO, weights(columns=GROUPED), st.integers(0, 2**32))
def test_torchao_gives_pre_rounded_symbols_back(format: TorchaoInt, weight: Tensor, seed: int) -> None:
    assume(format.fixed_for(weight.dtype))
    rounded = pre_round(format, weight, seed)
    codes, _ = torchao(format, rounded.weight)
    assert torch.equal(codes.short(), rounded.codes)


@given(TINYGEMM, weights(SIXTEENS, GROUPED), st.integers(0, 2**32))
def test_torchao_tinygemm_gives_pre_rounded_symbols_back(format: TorchaoInt4, weight: Tensor, seed: int) -> None:
    assume(format.fixed_for(weight.dtype))
    rounded = pre_round(format, weight, seed)
    codes, _ = torchao(format, rounded.weight)
    assert torch.equal(codes.short(), rounded.codes)


@given(QUANTO, weights(), st.integers(0, 2**32))
def test_quanto_gives_pre_rounded_symbols_back(format: QuantoInt8 | QuantoIntGroup, weight: Tensor, seed: int) -> None:
    assume(format.fixed_for(weight.dtype))
    rounded = pre_round(format, weight, seed)
    codes, _ = quanto(format, rounded.weight)
    assert torch.equal(codes.short(), rounded.codes)


@pytest.mark.parametrize("name", ["torchao-int4", "torchao-intx4"])
def test_groups_that_do_not_divide_the_input_are_refused_by_name(name: str) -> None:
    with pytest.raises(WeightError, match=r"model\.proj\.weight: 100 input features .* group size"):
        get_format(name).quantize(torch.randn(4, 100), "model.proj.weight")


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 8, not {bits}"):
        TorchaoInt(bits)
    with pytest.raises(ValueError, match=f"2 to 8, not {bits}"):
        GPTQ(bits)


def test_quanto_frozen_into_its_kernels_layout_keeps_the_symbols() -> None:
    from optimum.quanto import QLinear, freeze, qint4

    weight = torch.randn(16, 256).bfloat16()
    layer = QLinear.from_module(linear(weight), weights=qint4)
    freeze(layer)
    stored = layer.weight.weight_qbits_tensor()
    assert torch.equal(stored._data.unpack().reshape(weight.shape), get_format("quanto-int4").quantize(weight).codes)


@given(weights(experts=True))
def test_one_scale_for_the_whole_tensor(weight: Tensor) -> None:
    quantized = TorchaoInt(group_size=None, scale_dtype=torch.float32).quantize(weight)
    assert quantized.grid.scale.shape == (1, 1)
    assert quantized.median_half_width() == pytest.approx(float(quantized.half_widths().median()))
