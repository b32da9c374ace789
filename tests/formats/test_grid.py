"""What holds of every registered format's grid, whoever wrote it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import DTYPES, slack, weights_for
from torch import Tensor

from optimum_qguard.formats import (
    Grid,
    Quantized,
    WeightError,
    format_names,
    get_format,
    midpoint_edges,
    weighted_median,
)

NAMES = format_names()
SMOOTH = ["normal", "outliers", "shifted", "one-sided"]
FIXED = [(name, dtype) for name in NAMES for dtype in DTYPES if get_format(name).fixed_for(dtype)]
every_format = pytest.mark.parametrize("name", NAMES)
few = settings(max_examples=10)


def whole(quantized: Quantized, per_block: Tensor | None) -> Tensor:
    """A number per block, spread over the weights; 0 where there is none."""
    numbers = torch.tensor(0.0) if per_block is None else per_block
    return quantized.format.unblock(numbers.expand(quantized.block_codes.shape), quantized.shape)


@every_format
@few
@given(data=st.data())
def test_weights_lie_in_their_cells(name: str, data: st.DataObject) -> None:
    format = get_format(name)
    weight = data.draw(weights_for(format))
    quantized = format.quantize(weight)
    lower, upper = quantized.bounds()
    scale, offset = whole(quantized, quantized.grid.scale), whole(quantized, quantized.grid.offset)
    rounding = slack(weight.half() if name == "int8-rowwise" else weight, offset) + 1e-7 * (upper - lower) + 1e-7
    if name == "gguf-iq4_nl":  # whose symbols are chosen by the scale before it is stored in float16
        rounding = rounding + 2**-11 * torch.maximum(lower.abs(), upper.abs())
    # The quantizer clamps what lies beyond its end symbols; a scale of 0 (GGUF) leaves no cells.
    bottom, top = quantized.codes == 0, quantized.codes == len(quantized.grid.alphabet) - 1
    bottom, top = torch.where(scale < 0, top, bottom), torch.where(scale < 0, bottom, top)
    assert ((weight >= lower - rounding) | bottom | (scale == 0)).all()
    assert ((weight <= upper + rounding) | top | (scale == 0)).all()
    assert quantized.codes.shape == lower.shape == quantized.dequantize().shape == weight.shape


@every_format
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_points_strictly_inside_a_cell_have_its_symbol(name: str, data: st.DataObject, seed: int) -> None:
    format = get_format(name)
    weight = data.draw(weights_for(format, SMOOTH))
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    codes = format.encode(blocks, grid)
    lower, upper = grid.bounds(codes)
    generator = torch.Generator().manual_seed(seed)
    points = lower + (upper - lower) * (0.1 + 0.8 * torch.rand(blocks.shape, generator=generator))
    resolved = upper - lower > 1e-5 * points.abs().amax(-1, keepdim=True) + 1e-6
    assert (format.encode(points, grid) == codes)[resolved].all()


@every_format
@few
@given(data=st.data())
def test_half_widths(name: str, data: st.DataObject) -> None:
    format = get_format(name)
    weight = data.draw(weights_for(format))
    quantized = format.quantize(weight)
    half_widths = quantized.half_widths()
    lower, upper = quantized.bounds()
    inner = (quantized.codes > 0) & (quantized.codes < len(quantized.grid.alphabet) - 1)
    rounding = 1e-6 * (lower.abs() + upper.abs() + whole(quantized, quantized.grid.offset).abs()) + 1e-10
    assert (((upper - lower) / 2 - half_widths).abs() <= rounding)[inner].all()
    assert quantized.median_half_width() == pytest.approx(float(half_widths.median()), rel=1e-6)


@every_format
@few
@given(data=st.data())
def test_rounding_to_neighbours_is_unbiased(name: str, data: st.DataObject) -> None:
    format = get_format(name)
    weight = data.draw(weights_for(format, SMOOTH, [torch.float32]))
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    below, fraction = grid.neighbour_below(blocks)
    assert ((fraction >= 0) & (fraction <= 1)).all()
    low, high = grid.decode(below), grid.decode(below + 1)
    ends = grid.decode(torch.tensor([grid.first, len(grid.alphabet) - 1]).expand(len(blocks), 2))
    in_range = (blocks >= ends.amin(-1, keepdim=True)) & (blocks <= ends.amax(-1, keepdim=True))
    mean = low * (1 - fraction) + high * fraction
    rounding = 1e-5 * blocks.abs().amax(-1, keepdim=True) + 1e-10
    assert ((mean - blocks).abs() <= rounding)[in_range].all()


@pytest.mark.parametrize(("name", "dtype"), FIXED)
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_pre_rounded_symbols_come_back(name: str, dtype: torch.dtype, data: st.DataObject, seed: int) -> None:
    """By our own quantizer; each format's own test asks the library."""
    format = get_format(name)
    weight = data.draw(weights_for(format, dtypes=[dtype]))
    rounded = pre_round(format, weight, seed)
    assert torch.equal(format.quantize(rounded.weight).codes.short(), rounded.codes)


@every_format
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_stochastic_rounding_chooses_neighbours_with_their_probability(
    name: str, data: st.DataObject, seed: int
) -> None:
    format = get_format(name)
    weight = data.draw(weights_for(format, SMOOTH, [torch.float32]))
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    uniform = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed)).clamp(0.01, 0.99)
    below, fraction = grid.neighbour_below(blocks)
    rounded = grid.round_stochastically(blocks, uniform.clone())
    # Which of u and 1 - u decides is the grid's business; near-ties are rounding's.
    down, up = grid.on_grid(below), grid.on_grid(below + 1)
    tolerance = 1e-5 * blocks.abs().amax(-1, keepdim=True) + 1e-10
    is_down, is_up = (rounded - down).abs() <= tolerance, (rounded - up).abs() <= tolerance
    assert (is_down | is_up).all()
    certain = (
        ((uniform - fraction).abs() > 1e-2) & ((1 - uniform - fraction).abs() > 1e-2) & ((up - down) > 4 * tolerance)
    )
    expected = is_up == (uniform < fraction)
    mirrored = is_up == (1 - uniform < fraction)
    assert expected[certain].all() or mirrored[certain].all()


@every_format
@pytest.mark.parametrize("shape", [(0, 256), (128, 0), (0, 128, 256)])
def test_weights_of_no_elements(name: str, shape: tuple[int, ...]) -> None:
    quantized = get_format(name).quantize(torch.zeros(shape))
    assert quantized.codes.shape == quantized.dequantize().shape == quantized.half_widths().shape == shape
    assert quantized.median_half_width() == 0


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_constant_rows_decode_to_themselves(name: str, dtype: torch.dtype) -> None:
    format = get_format(name)
    assert not format.quantize(torch.zeros(128, 256, dtype=dtype)).dequantize().any()
    constant = torch.full((128, 256), -0.75, dtype=dtype)
    quantized = format.quantize(constant)
    assert (quantized.dequantize() + 0.75).abs().max() <= 2 * quantized.half_widths().max() + 0.01


@every_format
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_weights_that_are_no_numbers(name: str, value: float, kind: str) -> None:
    weight = torch.ones(128, 256)
    weight[3, 5] = value
    with pytest.raises(WeightError, match=rf"model\.layer\.weight: 1 {kind} weight.*\(3, 5\)"):
        get_format(name).quantize(weight, "model.layer.weight")


@every_format
def test_transposed_weights(name: str) -> None:
    weight = torch.randn(256, 128).t()
    straight = weight.contiguous()
    assert torch.equal(get_format(name).quantize(weight).codes, get_format(name).quantize(straight).codes)


@every_format
def test_a_range_of_blocks_is_encoded_like_the_whole(name: str) -> None:
    format = get_format(name)
    blocks = format.blocks(torch.randn(256, 512))
    grid, middle = format.grid(blocks), slice(len(blocks) // 3, len(blocks) // 2 + 1)
    assert torch.equal(format.encode(blocks, grid)[middle], format.encode(blocks[middle], grid[middle]))


@every_format
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(name: str) -> None:
    weight = torch.randn(256, 512)
    here, there = get_format(name).quantize(weight), get_format(name).quantize(weight.cuda())
    assert (here.codes == there.codes.cpu()).float().mean() > 0.9999
    torch.testing.assert_close(here.half_widths().median(), there.half_widths().median().cpu())


def changed_share_of_a_uniform_residual() -> float:
    """Closed form for a residual uniform in its cell and Gaussian noise of one half-width."""
    normal = torch.distributions.Normal(0.0, 1.0)
    density = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in (0, 2)]
    return 1 - ((4 * float(normal.cdf(torch.tensor(2.0))) + 2 * density[1] - 2 * density[0]) - 2) / 2


def test_the_closed_form_is_its_integral() -> None:
    residual = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    stays = normal.cdf(1 - residual) - normal.cdf(-1 - residual)
    assert changed_share_of_a_uniform_residual() == pytest.approx(1 - float(stays.mean()), abs=1e-5)
    assert changed_share_of_a_uniform_residual() == pytest.approx(0.390, abs=5e-4)


@pytest.mark.parametrize("name", ["int8-rowwise", "torchao-int8", "quanto-int8"])
def test_gaussian_noise_of_a_half_width_changes_the_closed_forms_share_of_symbols(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator)
    format = get_format(name)
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    codes = format.encode(blocks, grid)
    noise = torch.randn(blocks.shape, generator=generator) * grid.half_widths(codes)
    changed = codes != format.encode(blocks + noise, grid)
    assert float(changed.float().mean()) == pytest.approx(changed_share_of_a_uniform_residual(), abs=0.005)


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(0, 5)), min_size=1, max_size=20))
def test_weighted_median_is_the_median_of_repetitions(pairs: list[tuple[float, int]]) -> None:
    values, weights = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    repeated = values.repeat_interleave(weights)
    expected = repeated.median() if len(repeated) else torch.tensor(0.0)
    assert weighted_median(values, weights) == expected


def test_slices_of_a_grid_keep_everything() -> None:
    alphabet = torch.arange(3.0)
    column = torch.arange(4.0)[:, None]
    grid = Grid(alphabet, midpoint_edges(alphabet), column, column + 1, column + 2, column + 3, first=1)
    part: dict[str, Any] = vars(grid[1:3])
    assert {k: v.flatten().tolist() for k, v in part.items() if isinstance(v, Tensor) and v.shape[-1:] == (1,)} == {
        "scale": [1, 2],
        "offset": [2, 3],
        "decode_scale": [3, 4],
        "decode_offset": [4, 5],
    }
    assert part["first"] == 1


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown format 'nf5'; known: .*nf4"):
        get_format("nf5")
