from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.formats import Quantized, WeightError, get_format
from optimum_qguard.formats.float8 import Float8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = [
    "torchao-float8",
    "torchao-float8-tensor",
    "quanto-float8",
    "fp8-block",
    "fp8-block-ue8m0",
    "fp8-e4m3-tensor",
    "fp8-e4m3-row",
    "fp8-e5m2-tensor",
    "fp8-e5m2-row",
]
LIBRARIES = NAMES[:5]


@st.composite
def weights(draw: st.DrawFn, tiles: bool = False, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """Heavy-tailed weights without a zero row, at least two columns (torchao); sides 128 or 256 for `tiles`."""
    side = st.sampled_from([128, 256]) if tiles else st.integers(2, 70)
    rows, columns = draw(side), draw(side)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.02, 1.0, 30.0]))
    normal = torch.randn(rows, columns, generator=generator)
    tail = torch.randn(rows, columns, generator=generator).exp()
    weight = (normal * tail * spread).to(draw(st.sampled_from(dtypes)))
    return torch.where(weight == 0, spread, weight)


def library(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the real library stores: FP8 codes and the scales that it multiplies them by when it decodes."""
    if name.startswith("torchao"):
        from torchao.quantization import Float8WeightOnlyConfig, PerRow, PerTensor, quantize_

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight.clone())
        quantize_(linear, Float8WeightOnlyConfig(granularity=PerTensor() if name.endswith("tensor") else PerRow()))
        return linear.weight.qdata, linear.weight.scale.expand(len(weight), 1)
    if name == "quanto-float8":
        from optimum.quanto import QLinear, freeze, qfloat8

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = torch.nn.Parameter(weight.clone())
        quantized = QLinear.from_module(linear, weights=qfloat8)
        freeze(quantized)
        return quantized.weight._data, quantized.weight._scale.float().expand(len(weight), 1)
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0" if name.endswith("ue8m0") else "float")
    stored = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"layer.weight": weight})
    return stored["layer.weight"], stored["layer.weight_scale_inv"].float().flatten()[:, None]


def symbols(quantized: Quantized) -> Tensor:
    return quantized.grid.alphabet[quantized.codes.long()]


def pre_round(quantized: Quantized, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each weight at one of the two grid values around it, absmax elements left alone; and the symbols that it has."""
    blocks = quantized.format.blocks(weight).float()
    below, share = quantized.grid.neighbour_below(blocks)
    draw = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed))
    codes = (below + (draw < share)).to(torch.uint8)
    absmax = blocks.abs().amax() if quantized.format.block == "tensor" else blocks.abs().amax(-1, keepdim=True)
    extreme = blocks.abs() == absmax
    codes = torch.where(extreme, quantized.block_codes, codes)
    values = torch.where(extreme, blocks, quantized.grid.on_grid(codes))
    shape = weight.shape
    return quantized.format.unblock(values, shape).to(weight.dtype), quantized.format.unblock(codes, shape)


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_library_stores_the_same_codes_and_scales(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights(tiles="block" in name))
    quantized = get_format(name).quantize(weight)
    codes, scale = library(name, weight)
    assert torch.equal(symbols(quantized), codes.float())
    assert torch.equal(quantized.grid.scale, scale)
    assert torch.equal(
        quantized.dequantize(), quantized.format.unblock(quantized.format.blocks(codes.float()) * scale, weight.shape)
    )


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_library_returns_the_symbols_of_on_grid_weights(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights(tiles="block" in name))
    quantized = get_format(name).quantize(weight)
    assume(weight.dtype != torch.float16 or quantized.grid.scale.min() > 2**-15)
    rounded, chosen = pre_round(quantized, weight, data.draw(st.integers(0, 2**32)))
    assert torch.equal(library(name, rounded)[0].float(), quantized.grid.alphabet[chosen.long()])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_weights_lie_in_their_cells_and_cells_have_one_code(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights(tiles="block" in name))
    fmt = get_format(name)
    quantized = fmt.quantize(weight)
    lower, upper = quantized.bounds()
    slack = 2.0**-8 if name == "quanto-float8" and weight.dtype != torch.float32 else 2.0**-22
    assert (weight.float() >= lower - slack * lower.abs()).all()
    assert (weight.float() <= upper + slack * upper.abs()).all()

    inside = lower + (upper - lower) * (0.01 + 0.98 * torch.rand(weight.shape))
    assert torch.equal(fmt.unblock(fmt.encode(fmt.blocks(inside), quantized.grid), weight.shape), quantized.codes)
    part = slice(0, 1)
    first = fmt.encode(fmt.blocks(weight)[part], quantized.grid[part])
    assert torch.equal(first, quantized.block_codes[part])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_alphabet_and_half_widths(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = every[every.isfinite()].unique()
    quantized = Float8(dtype).quantize(finite[None])
    grid = quantized.grid
    assert torch.equal(grid.alphabet, finite)
    assert torch.equal(quantized.dequantize(), finite[None])

    normal = finite.abs() >= torch.finfo(dtype).smallest_normal
    exponent = finite.abs().clamp(min=torch.finfo(dtype).smallest_normal).log2().floor()
    spacing = torch.finfo(dtype).eps * exponent.exp2()
    power_of_two = normal & (finite.abs() == exponent.exp2()) & (finite.abs() > torch.finfo(dtype).smallest_normal)
    expected = torch.where(power_of_two, spacing * 0.75, spacing) / 2
    assert torch.equal(quantized.half_widths()[0], expected)
    assert quantized.median_half_width() == pytest.approx(float(expected.median()))


def test_symbols_match_the_dtype_cast() -> None:
    values = torch.linspace(-448, 448, 20001)[None]
    assert torch.equal(symbols(Float8().quantize(values)), values.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_constants(name: str) -> None:
    zeros = get_format(name).quantize(torch.zeros(128, 128))
    assert not zeros.dequantize().any()
    assert not zeros.half_widths().any()
    constant = get_format(name).quantize(torch.full((128, 128), -0.7))
    assert constant.dequantize().unique().numel() == 1
    torch.testing.assert_close(constant.dequantize()[0, 0], torch.tensor(-0.7), rtol=0.07, atol=0)


@pytest.mark.parametrize("name", ["torchao-float8", "quanto-float8"])
def test_the_library_stores_nan_in_a_zero_row(name: str) -> None:
    weight = torch.eye(4)
    weight[2] = 0
    codes, _ = library(name, weight)
    assert codes[2].float().isnan().all()
    assert torch.equal(symbols(get_format(name).quantize(weight)), codes.float().nan_to_num(0))


def test_tiles_of_zeros_decode_as_in_transformers() -> None:
    weight = torch.randn(256, 256)
    weight[:128, 128:] = 0
    codes, scale = library("fp8-block", weight)
    quantized = get_format("fp8-block").quantize(weight)
    assert torch.equal(symbols(quantized), codes.float())
    expected = quantized.format.unblock(quantized.format.blocks(codes.float()) * scale, weight.shape)
    assert torch.equal(quantized.dequantize(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 128, 128)])
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    quantized = get_format(name).quantize(torch.zeros(shape))
    assert quantized.codes.shape == quantized.dequantize().shape == torch.Size(shape)
    assert quantized.median_half_width() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_tensor(name: str, bad: float) -> None:
    weight = torch.ones(128, 128, dtype=torch.bfloat16)
    weight[3, 5] = bad
    with pytest.raises(WeightError, match=r"layers\.0\.up_proj\.weight: .*\(3, 5\)"):
        get_format(name).quantize(weight, "layers.0.up_proj.weight")


def test_shapes_that_do_not_fit_name_the_tensor() -> None:
    with pytest.raises(WeightError, match=r"k_proj\.weight: 192 x 576 cannot be cut into tiles of 128 x 128"):
        get_format("fp8-block").quantize(torch.ones(192, 576), "k_proj.weight")
    with pytest.raises(WeightError, match=r"norm\.weight: has 1 dimension"):
        get_format("fp8-e4m3-row").quantize(torch.ones(576), "norm.weight")


@pytest.mark.parametrize("name", ["fp8-block", "fp8-e4m3-row", "torchao-float8"])
def test_experts_are_quantized_one_by_one(name: str) -> None:
    experts = torch.randn(3, 128, 256)
    together = get_format(name).quantize(experts)
    alone = torch.stack([get_format(name).quantize(expert).dequantize() for expert in experts])
    assert torch.equal(together.dequantize(), alone)
    assert together.half_widths().shape == experts.shape


def test_one_scale_per_expert_or_for_all() -> None:
    experts = torch.randn(3, 8, 16) * torch.tensor([1.0, 10, 100])[:, None, None]
    assert Float8(block="matrix").quantize(experts).grid.scale.unique().numel() == 3
    assert Float8(block="tensor").quantize(experts).grid.scale.unique().numel() == 1


@pytest.mark.parametrize("name", ["torchao-float8", "quanto-float8"])
def test_an_end_symbol_beyond_the_absmax_does_not_move_the_scale(name: str) -> None:
    absmax = torch.arange(128, 256).to(torch.bfloat16)[:, None]
    weight = torch.cat([absmax, absmax * 0.97], dim=1)
    quantized = get_format(name).quantize(weight)
    assert (quantized.grid.scale * 448 > absmax).any()
    ends = torch.full((128, 2), len(quantized.grid.alphabet) - 1)
    codes, scale = library(name, quantized.grid.on_grid(ends).to(torch.bfloat16))
    assert torch.equal(scale, quantized.grid.scale)
    assert (codes.float() == 448).all()


def test_float16_is_too_coarse_for_e5m2_alone() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    assert [get_format("fp8-e5m2-row").fixed_for(dtype) for dtype in dtypes] == [True, True, False]
    assert all(get_format("fp8-e4m3-row").fixed_for(dtype) for dtype in dtypes)
    weight = (torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) ** 5 * 0.01).half()
    for name, comes_back in [("fp8-e5m2-row", False), ("fp8-e4m3-row", True)]:
        quantized = get_format(name).quantize(weight)
        rounded, chosen = pre_round(quantized, weight, 0)
        assert torch.equal(get_format(name).quantize(rounded).codes, chosen) == comes_back
