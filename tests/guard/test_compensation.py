"""Rounding with error feedback, one tensor at a time: unbiased, closer than without, stored by the real libraries."""

import math

import pytest
import torch
from libraries import ON_LOAD, library_format, quantize_with_library, stored
from torch import Tensor

from optimum_qguard.formats import Format, WeightError, get_format
from optimum_qguard.guard.compensation import feedback, hand_over, round_compensated
from optimum_qguard.guard.noise import draw
from optimum_qguard.guard.random import RandomStream

COLUMNS = 128
SEEDS = 1000


def second_moment(columns: int = COLUMNS) -> Tensor:
    """Of inputs that go together: sixteen directions carry most of them."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4096, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    inputs += 0.3 * torch.randn(4096, columns, generator=generator)
    return inputs.T @ inputs / len(inputs)


def random_weight(rows: int, columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)


def rounded(weight: Tensor, format: Format, seed: int = 0, damping: float = 0.1) -> Tensor:
    moment = second_moment(weight.shape[1])
    return round_compensated(weight, format, feedback(moment, damping), RandomStream(seed, "w"), name="w")


def loss(error: Tensor) -> float:
    return float(((error @ second_moment(error.shape[1])) * error).sum())


def sets_scale(weight: Tensor, format: Format) -> Tensor:
    blocks = format.blocks(weight)
    extreme = (blocks == blocks.amin(-1, keepdim=True)) | (blocks == blocks.amax(-1, keepdim=True))
    return format.unblock(extreme, weight.shape)


@pytest.mark.parametrize("name", ON_LOAD)
def test_the_mean_over_seeds_is_the_weight(name: str) -> None:
    """Every row is the same weight, and rounded with random numbers of its own."""
    format, one = library_format(name), random_weight(2)
    weight = one.repeat(SEEDS, 1)
    quantized = format.quantize(hand_over(weight, format, rounded(weight, format)).weight)
    error = (quantized.dequantize().double() - weight.double()).view(SEEDS, -1)
    blocks = format.blocks(one)
    grid = format.grid(blocks)
    ends = torch.tensor([[grid.first, len(grid.alphabet) - 1]]).expand(len(blocks), 2)
    inside = (blocks > grid.decode(ends)[:, :1]) & (blocks < grid.decode(ends)[:, 1:])
    free = (format.unblock(inside, one.shape) & ~sets_scale(one, format)).flatten()
    assert free.double().mean() > 0.9
    error = error[:, free]
    z = error.mean(0) / (error.std(0).clamp(min=1e-12) / math.sqrt(SEEDS))
    moved = error.std(0) > 1e-9
    assert moved.double().mean() > 0.9
    assert z[moved].abs().max() < 4.8
    signs = torch.randint(0, 2, (200, error.shape[1]), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    signs[0], signs[1] = 1, one.flatten()[free].sign()
    projected = error @ signs.double().T
    assert (projected.mean(0) / (projected.std(0) / math.sqrt(SEEDS))).abs().max() < 4.5


def test_weights_near_the_end_are_not_pulled_inwards() -> None:
    """What an attacker could use: if adjusted weights were only cut off at the end of the alphabet, those near it would
    all move the same way."""
    weight = random_weight(1).clamp(-0.02, 0.02)
    weight[:, ::64], weight[:, 1::64] = 0.04, -0.04
    near = torch.arange(COLUMNS) % 8 == 5
    weight[:, near] = 0.0396
    format = get_format("nf4")
    weight = weight.repeat(4 * SEEDS, 1)
    error = (format.quantize(hand_over(weight, format, rounded(weight, format)).weight).dequantize() - weight)[:, near]
    deviation = error.double().std(0)
    assert float(deviation.min()) > 0.1 * 0.04 * (1 - 0.7229568362236023), "they were not rounded at random"
    assert float((error.double().mean(0) / deviation * math.sqrt(len(error))).abs().max()) < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_LOAD)
def test_the_library_stores_the_chosen_symbols(name: str, dtype: torch.dtype) -> None:
    format, weight = library_format(name), random_weight(32, 256, dtype)
    if not format.fixed_for(dtype):
        with pytest.raises(ValueError, match="w: compensation needs a grid"):
            rounded(weight, format)
        return
    codes = rounded(weight, format)
    handed = hand_over(weight, format, codes)
    assert handed.weight.dtype == dtype
    symbols, _ = stored(quantize_with_library(name, handed.weight), format, weight.shape)
    assert torch.equal(symbols, codes.long())
    changed = codes.long() != format.quantize(weight).codes.long()
    assert handed.share_changed == pytest.approx(float(changed.double().mean()), abs=0.02)


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q8_0", "fp8-block", "mxfp4", "nvfp4"])
def test_other_formats_quantize_to_the_chosen_symbols(name: str) -> None:
    format, weight = get_format(name), random_weight(128)
    assert format.fixed_for(weight.dtype)
    codes = rounded(weight, format)
    assert torch.equal(format.quantize(hand_over(weight, format, codes).weight).codes, codes)


@pytest.mark.parametrize("name", ON_LOAD)
def test_what_sets_the_scale_stays(name: str) -> None:
    format, weight = library_format(name), random_weight(8)
    after = hand_over(weight, format, rounded(weight, format)).weight
    assert torch.equal(format.grid(format.blocks(weight)).scale, format.grid(format.blocks(after)).scale)
    greatest = format.blocks(weight).abs().argmax(-1, keepdim=True)
    assert torch.equal(format.blocks(weight).gather(-1, greatest), format.blocks(after).gather(-1, greatest))


@pytest.mark.parametrize("name", ON_LOAD)
def test_outputs_change_less_than_without_feedback_and_than_rounded_to_nearest(name: str) -> None:
    format, weight = library_format(name), random_weight(64)
    compensated = format.quantize(hand_over(weight, format, rounded(weight, format)).weight).dequantize() - weight
    without = draw(weight, format, "stochastic", RandomStream(0, "w")).weight
    assert loss(compensated) < 0.35 * loss(format.quantize(without).dequantize() - weight)
    assert loss(compensated) < 0.7 * loss(format.quantize(weight).dequantize() - weight)


def test_the_loss_is_that_of_the_factorization() -> None:
    """``sum_k D_k E e_k^2`` on a uniform grid, where ``E e_k^2`` is a sixth of a squared step."""
    format, weight = get_format("int8-rowwise"), random_weight(400)
    error = (
        format.quantize(hand_over(weight, format, rounded(weight, format, damping=1e-6)).weight).dequantize() - weight
    )
    ordered = second_moment()[feedback(second_moment()).order][:, feedback(second_moment()).order].double()
    pivots = torch.linalg.cholesky(ordered.flip(0, 1)).diagonal().square()
    steps = format.grid(format.blocks(weight)).scale.double()
    assert loss(error) == pytest.approx(float(pivots.sum() * steps.square().sum() / 6), rel=0.05)


def test_blocks_that_span_rows_and_incomplete_ones() -> None:
    format, weight = get_format("nf4"), random_weight(5, 72)
    codes = rounded(weight, format)
    after = hand_over(weight, format, codes).weight
    assert torch.equal(format.quantize(after).codes, codes)
    assert loss(format.quantize(after).dequantize() - weight) < loss(format.quantize(weight).dequantize() - weight)


def test_the_seed_and_the_name_decide() -> None:
    format, weight = get_format("nf4"), random_weight(16)
    assert torch.equal(rounded(weight, format, 3), rounded(weight, format, 3))
    assert not torch.equal(rounded(weight, format, 3), rounded(weight, format, 4))
    other = round_compensated(weight, format, feedback(second_moment()), RandomStream(3, "v"))
    assert not torch.equal(rounded(weight, format, 3), other)


def test_without_correlations_it_is_plain_stochastic_rounding() -> None:
    format, weight = get_format("nf4"), random_weight(16)
    codes = round_compensated(weight, format, feedback(torch.eye(COLUMNS)), RandomStream(0, "w"))
    without = draw(weight, format, "stochastic", RandomStream(0, "w")).weight
    assert (codes == format.quantize(without).codes).double().mean() > 0.999


def test_zero_weights() -> None:
    weight = torch.zeros(4, COLUMNS)
    weight[2] = random_weight(1)[0]
    for name in ("nf4", "int8-rowwise", "quanto-int4"):
        format = get_format(name)
        after = hand_over(weight, format, rounded(weight, format)).weight
        assert not format.quantize(after).dequantize()[[0, 1, 3]].any()


def test_bad_weights_and_inputs() -> None:
    weight = random_weight(4)
    with pytest.raises(ValueError, match="do not fit 64 inputs"):
        round_compensated(weight, get_format("nf4"), feedback(torch.eye(64)), RandomStream(0, "w"), name="w")
    for moment in (torch.zeros(8, 8), torch.full((8, 8), torch.nan)):
        with pytest.raises(ValueError, match="second moment of the inputs is zero, infinite or not a number"):
            feedback(moment)
    weight[1, 2] = torch.nan
    with pytest.raises(WeightError, match="w: 1 NaN"):
        rounded(weight, get_format("nf4"))


def test_weights_beyond_what_the_library_computes_in() -> None:
    """bitsandbytes takes the scale of LLM.int8() in float16, where these are infinite."""
    format, weight = get_format("int8-rowwise"), torch.full((2, 4), 7e4)
    with pytest.raises(WeightError, match="w: weights too large for the quantizer's own precision"):
        round_compensated(weight, format, feedback(torch.eye(4)), RandomStream(0, "w"), name="w")
    with pytest.raises(WeightError, match="w: weights too large for the quantizer's own precision"):
        hand_over(weight, format, torch.zeros(2, 4, dtype=torch.uint8), name="w")
