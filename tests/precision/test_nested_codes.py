"""The top bits of a code are the code of fewer bits, and values are what the definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.nested_codes import NestedCodes, check_weight, encode, group_size_of, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = range(2, 9)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A weight with groups off centre, of very different sizes, or constant, and its group size."""
    group = draw(st.sampled_from([16, 24, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4)), group
    weight = torch.randn(shape, generator=generator)
    weight *= 10.0 ** torch.randint(-4, 3, shape[:2], generator=generator).unsqueeze(-1)
    weight += torch.randint(-2, 3, shape[:2], generator=generator).unsqueeze(-1)
    weight[torch.rand(shape[:2], generator=generator) < 0.1] = draw(st.sampled_from([0.0, 1.0, -1e-6]))
    return weight.reshape(shape[0], -1).to(draw(st.sampled_from(DTYPES))), group


def parts(nested: NestedCodes, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origin and scale of each weight, and gain and shift ``(7, 2, out, 1)``, in float64."""
    origin, scale = nested.grid.view(torch.bfloat16).double().repeat_interleave(group, -1)
    return origin, scale, nested.line.view(torch.bfloat16).double().unsqueeze(-1)


@given(weights())
def test_every_weight_lies_in_its_cell_at_every_width(case: tuple[Tensor, int]) -> None:
    weight, group = case
    nested = encode(weight, group)
    origin, scale, _ = parts(nested, group)
    for bits in WIDTHS:
        cell = scale * 2 ** (8 - bits)
        low = origin + cell * (nested.codes >> (8 - bits))
        slack = 1e-6 * (weight.double().abs() + 256 * scale)
        assert (weight >= low - slack).all()
        assert (weight <= low + cell + slack).all()


@given(weights())
def test_values_are_what_the_definition_says(case: tuple[Tensor, int]) -> None:
    weight, group = case
    nested = encode(weight, group)
    origin, scale, line = parts(nested, group)
    for bits in WIDTHS:
        position = ((nested.codes >> (8 - bits)).double() + 0.5) * 2 ** (8 - bits)
        gain, shift = line[8 - bits]
        values = origin + scale * (128 + shift + (1 + gain) * (position - 128))
        error = (nested.dequantize(bits) - values).abs()
        assert (error <= 1e-6 * (origin.abs() + 256 * scale)).all()


@given(weights())
def test_error_of_8_bits_is_half_a_step(case: tuple[Tensor, int]) -> None:
    weight, group = case
    nested = encode(weight, group)
    _, scale, line = parts(nested, group)
    assert (line[0] == 0).all()
    error = (nested.dequantize(8).double() - weight.double()).abs()
    assert (error <= scale / 2 + 1e-6 * (weight.double().abs() + 256 * scale)).all()


@given(weights())
def test_spans_are_tight(case: tuple[Tensor, int]) -> None:
    """Rounding to BF16 widens a group's span by 2 % of itself and 1 % of its weights at most."""
    weight, group = case
    _, scale, _ = parts(encode(weight, group), group)
    blocks = weight.double().reshape(len(weight), -1, group)
    span = (blocks.amax(-1) - blocks.amin(-1)).repeat_interleave(group, -1)
    largest = blocks.abs().amax(-1).repeat_interleave(group, -1)
    assert (256 * scale <= 1.02 * span + 0.01 * largest + 1e-35).all()


def test_lines_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 96, generator=generator) * torch.rand(6, 1, generator=generator)
    nested = encode(weight, 32)
    origin, scale, line = parts(nested, 32)
    for bits in range(2, 8):
        position = ((nested.codes >> (8 - bits)).double() + 0.5) * 2 ** (8 - bits)
        for row in range(6):
            columns = torch.stack([scale[row] * (position[row] - 128), scale[row]], 1)
            target = weight[row].double() - origin[row] - 128 * scale[row]
            slope, shift = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution.flatten()
            # The gain is stored with 8 binary digits, and the shift is the best one for that gain.
            assert line[8 - bits, 0, row] == pytest.approx(float(slope) - 1, rel=2**-8, abs=1e-5)
            assert line[8 - bits, 1, row] == pytest.approx(float(shift), rel=2**-7, abs=0.02)


def test_as_good_as_direct_quantization() -> None:
    """Rounding to 2^b points from least to greatest is what direct quantization does."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    nested = encode(weight, 128)
    blocks = weight.view(64, 4, 128)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    for bits in WIDTHS:
        step = (high - low) / (2**bits - 1)
        direct = ((blocks - low) / step).round() * step + low
        error = (nested.dequantize(bits).view_as(blocks) - blocks).square().mean()
        assert error <= 1.05 * (direct - blocks).square().mean()


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"), [(576, 128, 96), (512, 128, 128), (48, 128, 48), (131, None, 131)]
)
def test_group_size(columns: int, group_size: int | None, expected: int) -> None:
    assert group_size_of(columns, group_size) == expected


def test_no_group_size() -> None:
    with pytest.raises(PrecisionError, match="131 input features have no divisor from 16 to the group size 128"):
        group_size_of(131, 128)


@pytest.mark.parametrize("columns", [64, 3 * 2**17])
def test_tiles_are_the_rows_in_their_order(columns: int) -> None:
    nested = encode(torch.randn(7, columns, generator=torch.Generator().manual_seed(0)), 64)
    for bits in (8, 3):
        parts = list(tiles(nested.codes, nested.grid, nested.line, bits))
        assert len(parts) == (1 if columns == 64 else 4)
        assert torch.equal(torch.cat(parts), nested.dequantize(bits))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 16, dtype=dtype)
    weight[1, 3] = value
    with pytest.raises(PrecisionError, match="not finite"):
        check_weight(weight)


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_no_weights(shape: tuple[int, int]) -> None:
    with pytest.raises(PrecisionError, match="nothing to quantize: give its layer null"):
        check_weight(torch.zeros(shape))


def test_too_large() -> None:
    with pytest.raises(PrecisionError, match="near the largest BF16 number"):
        check_weight(torch.tensor([[-3e38, 3e38] * 8]))


def test_the_largest_that_is_allowed() -> None:
    weight = torch.tensor([[-1e38, 1e38] * 8])
    check_weight(weight)
    torch.testing.assert_close(encode(weight, 16).dequantize(8), weight, rtol=0.01, atol=0)
