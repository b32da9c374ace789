from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import weights
from torch import Tensor

from optimum_qguard.formats import Format, WeightError, get_format
from optimum_qguard.formats.microscaling import MXFP4, NVFP4, ScaleRule

RULES = get_args(ScaleRule)
FORMATS = [*(MXFP4(rule) for rule in RULES), NVFP4(), NVFP4(tensor_scale=False)]
DTYPES = [torch.float32, torch.bfloat16]  # torchao takes no float16
NAMES = ["mxfp4", "mxfp4-floor", "gguf-mxfp4", "nvfp4"]
few = settings(max_examples=25)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def weights_for(format: Format, kinds: list[str] | None = None) -> st.SearchStrategy[Tensor]:
    columns = st.integers(1, 5).map(lambda count: 32 * count)
    return weights(columns=columns, dtypes=DTYPES, **({} if kinds is None else {"kinds": kinds}))


def by_torchao(format: Format, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signed FP4 symbols and decoded values of torchao's own tensor, shaped like the weight."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    if isinstance(format, MXFP4):
        rule = ScaleCalculationMode[format.scale_rule.upper()]
        stored = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, rule)
    else:
        assert isinstance(format, NVFP4)
        scale = per_tensor_amax_to_scale(weight.abs().max()) if format.tensor_scale else None
        stored = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    symbols = f4_unpacked_to_f32(unpack_uint4(stored.qdata.view(torch.uint8)))
    return symbols.reshape(weight.shape), stored.dequantize(torch.float32)


@every_format
@few
@given(data=st.data())
def test_symbols_and_values_are_torchaos(format: Format, data: st.DataObject) -> None:
    weight = data.draw(weights_for(format))
    quantized = format.quantize(weight)
    if not weight.any():
        assert not quantized.dequantize().any()  # where torchao's NVFP4 divides by 0
        return
    symbols, values = by_torchao(format, weight)
    assert torch.equal(quantized.grid.alphabet[quantized.codes.long()], symbols)
    assert torch.equal(quantized.dequantize(), values)


@few
@given(data=st.data())
def test_ggmls_mxfp4(data: st.DataObject) -> None:
    libgguf = pytest.importorskip("libgguf")
    weight = data.draw(weights_for(get_format("gguf-mxfp4")))
    kind = libgguf.GGMLQuantizationType.MXFP4
    stored = libgguf.quantize_rows(weight.float().numpy(), kind)
    expected = torch.from_numpy(libgguf.dequantize_rows(stored, kind))
    assert torch.equal(get_format("gguf-mxfp4").quantize(weight).dequantize(), expected)


@every_format
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_torchao_returns_the_symbols_of_on_grid_weights(format: Format, data: st.DataObject, seed: int) -> None:
    weight = data.draw(weights_for(format, ["normal", "outliers", "ties", "shifted", "one-sided", "constant rows"]))
    rounded = pre_round(format, weight, seed)
    alphabet = format.grid(format.blocks(weight)).alphabet
    assert torch.equal(by_torchao(format, rounded.weight)[0], alphabet[rounded.codes.long()])


@every_format
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_weights_lie_in_their_cells(format: Format, data: st.DataObject, seed: int) -> None:
    weight = data.draw(weights_for(format)).float()
    quantized = format.quantize(weight)
    lower, upper = quantized.bounds()
    assume(format != NVFP4(tensor_scale=False) or float(weight.abs().max()) <= 448 * 6)
    slack = 1e-6 * weight.abs()
    assert (weight >= lower - slack).all()
    assert (weight <= upper + slack).all()
    inside = lower + (upper - lower) * (0.01 + 0.98 * torch.rand(weight.shape))
    inside_codes = format.unblock(format.encode(format.blocks(inside), quantized.grid), weight.shape)
    wide = quantized.half_widths() > 1e-30
    assert torch.equal(inside_codes[wide], quantized.codes[wide])
    blocks, half = format.blocks(weight), slice(0, 1)
    assert torch.equal(format.encode(blocks[half], quantized.grid[half]), quantized.block_codes[half])


def test_every_symbol_its_cell_and_both_ways_to_round_ties() -> None:
    alphabet = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    row = torch.cat([alphabet, -alphabet, ties, -ties, torch.tensor([6.0, 0.0])])[None]
    even = torch.tensor([0, 1.0, 1, 2, 2, 4, 4])
    down = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4])
    torchao = MXFP4("floor").quantize(row)
    assert torch.equal(torchao.dequantize()[0], torch.cat([alphabet, -alphabet, even, -even, torch.tensor([6.0, 0])]))
    ggml = MXFP4("floor", "toward zero").quantize(row)
    assert torch.equal(ggml.dequantize()[0], torch.cat([alphabet, -alphabet, down, -down, torch.tensor([6.0, 0])]))
    expected = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.375, 0.5, 0.75, 1.5])
    assert torch.equal(torchao.half_widths()[0, :8], expected)


def test_scale_rules() -> None:
    absmax = torch.tensor([[3.0], [3.4], [3.5], [4.0], [4.1], [6.0], [7.0], [7.9]])
    weight = absmax * torch.tensor([1.0] + [0.0] * 31)
    scales = {rule: MXFP4(rule).quantize(weight).grid.scale.flatten().tolist() for rule in RULES}
    assert scales == {
        "rceil": [0.5, 1, 1, 1, 1, 1, 2, 2],
        "floor": [0.5, 0.5, 0.5, 1, 1, 1, 1, 1],
        "even": [0.5, 0.5, 1, 1, 1, 1, 2, 2],
        "ceil": [1, 1, 1, 1, 2, 2, 2, 2],
    }


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_zero_size(name: str) -> None:
    zeros = get_format(name).quantize(torch.zeros(3, 64))
    assert not zeros.dequantize().any()
    assert not zeros.half_widths().any()
    for shape in [(0, 64), (3, 0), (2, 0, 32)]:
        empty = get_format(name).quantize(torch.zeros(shape))
        assert empty.codes.shape == torch.Size(shape)
        assert empty.median_half_width() == 0


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights_name_the_tensor(name: str) -> None:
    weight = torch.ones(2, 32)
    weight[1, 7] = float("nan")
    with pytest.raises(WeightError, match=r"up_proj\.weight: 1 NaN .* \(1, 7\)"):
        get_format(name).quantize(weight, "up_proj.weight")
    with pytest.raises(WeightError, match=r"up_proj\.weight: 40 columns are not a multiple of (16|32)"):
        get_format(name).quantize(torch.ones(2, 40), "up_proj.weight")


@pytest.mark.parametrize("name", ["mxfp4", "gguf-mxfp4"])
def test_experts_are_quantized_one_by_one(name: str) -> None:
    experts = torch.randn(3, 5, 64, dtype=torch.float16)
    alone = torch.stack([get_format(name).quantize(expert).dequantize() for expert in experts])
    assert torch.equal(get_format(name).quantize(experts).dequantize(), alone)
