"""The mathematics of one tensor, through the real libraries."""

import math
import subprocess
import sys

import pytest
import torch
from libraries import ON_LOAD, library_format, quantize_with_library, stored
from torch import Tensor

from optimum_qguard.formats import Format, WeightError, format, get_format
from optimum_qguard.guard import noise
from optimum_qguard.guard.noise import Draw, Method, draw, half_width
from optimum_qguard.guard.random import RandomStream

SEEDS = 400
METHODS: tuple[Method, ...] = ("stochastic", "gaussian", "uniform")


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)


def flat_weight(rows: int, columns: int) -> Tensor:
    """Uniform weights, each row with the same extremes: one scale for all, and residuals uniform in their cell."""
    weight = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weight[:, 0], weight[:, 1] = 1, -1
    return weight


def draw_with(
    weight: Tensor, format: Format, method: Method, seed: int = 0, amplitude: float | None = None, name: str = "w"
) -> Draw:
    return draw(weight, format, method, RandomStream(seed, name), amplitude=amplitude, name=name)


@pytest.fixture(scope="module", params=ON_LOAD)
def rounded(request: pytest.FixtureRequest) -> tuple[Format, Tensor, Tensor, Tensor]:
    """A format, a weight, and the symbols and values that its library stores under each of many seeds."""
    format = library_format(request.param)
    weight = random_weight(4, 128)
    drawn = [draw_with(weight, format, "stochastic", seed).weight for seed in range(SEEDS)]
    if request.param == "bnb-nf4-double":  # one tensor's block scales are quantized together
        pairs = [stored(quantize_with_library(request.param, one), format, one.shape) for one in drawn]
        codes, values = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    else:
        every = torch.cat(drawn)
        codes, values = stored(quantize_with_library(request.param, every), format, every.shape)
    return format, weight, codes.view(SEEDS, *weight.shape), values.view(SEEDS, *weight.shape)


def representable(format: Format, weight: Tensor) -> Tensor:
    """Weights between two symbols that unbiased rounding may choose, and that set no scale."""
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    ends = torch.tensor([[grid.first, len(grid.alphabet) - 1]]).expand(len(blocks), 2)
    inner = (blocks > grid.decode(ends)[:, :1]) & (blocks < grid.decode(ends)[:, 1:])
    return format.unblock(inner & (blocks > low) & (blocks < high), weight.shape)


def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(
    rounded: tuple[Format, Tensor, Tensor, Tensor],
) -> None:
    format, weight, codes, _ = rounded
    blocks = format.blocks(weight)
    below, fraction = (
        format.unblock(part, weight.shape) for part in format.grid(blocks).neighbour_below(blocks.float())
    )
    inner = representable(format, weight)
    assert inner.float().mean() > 0.9
    up = (codes - below)[:, inner]
    assert ((up == 0) | (up == 1)).all()
    share, expected = up.double().mean(0), fraction[inner].double()
    # Chernoff: a binomial share strays this far, in relative entropy, with probability at most 2 exp(-n KL).
    entropy = torch.special.xlogy(share, share / expected) + torch.special.xlogy(
        1 - share, (1 - share) / (1 - expected)
    )
    assert SEEDS * entropy.max() < math.log(2 * inner.sum() / 1e-4)


def test_the_library_decodes_the_weight_on_average(rounded: tuple[Format, Tensor, Tensor, Tensor]) -> None:
    """Whatever coherent direction a payload takes, its mean over seeds is that of the full-precision weight."""
    format, weight, _, values = rounded
    inner = representable(format, weight)
    error = (values.double() - weight.double())[:, inner]
    signs = torch.randint(0, 2, (200, error.shape[1]), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    signs[0] = 1
    signs[1] = weight[inner].sign()
    projected = error @ signs.double().T
    z = projected.mean(0) / (projected.std(0) / math.sqrt(SEEDS))
    assert z.abs().max() < 4.5


def test_stochastic_rounding_has_the_least_variance(rounded: tuple[Format, Tensor, Tensor, Tensor]) -> None:
    format, weight, _, values = rounded
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    below, fraction = grid.neighbour_below(blocks.float())
    step = grid.decode(below + 1) - grid.decode(below)
    expected = format.unblock(step**2 * fraction * (1 - fraction), weight.shape)
    inner = representable(format, weight)
    measured = (values - weight).square().mean(0)
    assert float(measured[inner].mean() / expected[inner].mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", ON_LOAD)
def test_what_sets_the_scale_stays(name: str) -> None:
    format = library_format(name)
    weight = random_weight(8, 128)
    before, after = format.blocks(weight), format.blocks(draw_with(weight, format, "stochastic").weight)
    assert torch.equal(format.grid(before).scale, format.grid(after).scale)
    greatest = before.abs().argmax(-1, keepdim=True)
    assert torch.equal(before.gather(-1, greatest), after.gather(-1, greatest))


@pytest.mark.parametrize("name", [*ON_LOAD, "gptq-4", "gguf-q4_0"])
@pytest.mark.parametrize("shape", [(32, 256), (7, 352)], ids=str)
def test_half_width_is_the_median_over_all_weights(name: str, shape: tuple[int, int]) -> None:
    format = library_format(name) if name in ON_LOAD else get_format(name)
    weight = random_weight(*shape)
    expected = format.quantize(weight).half_widths().flatten().median()
    assert half_width(weight, format, "w") == pytest.approx(float(expected), rel=1e-6)


def test_gaussian_noise_has_the_amplitude_as_standard_deviation() -> None:
    weight = random_weight(512, 1024)
    amplitude = half_width(weight, get_format("int8-rowwise"), "w")
    noise = draw_with(weight, get_format("int8-rowwise"), "gaussian", 3, amplitude).weight - weight
    assert float(noise.std()) == pytest.approx(amplitude, rel=4 / math.sqrt(2 * weight.numel()))
    assert abs(float(noise.mean())) < 4 * amplitude / math.sqrt(weight.numel())
    inside = (noise.abs() < amplitude).double().mean()
    assert float(inside) == pytest.approx(math.erf(math.sqrt(0.5)), abs=4 * 0.47 / math.sqrt(weight.numel()))


def test_uniform_noise_fills_its_range_and_no_more() -> None:
    weight = random_weight(512, 1024)
    noise = draw_with(weight, get_format("int8-rowwise"), "uniform", 3, 0.25).weight - weight
    assert noise.abs().max() < 0.25 + 1e-7
    assert noise.max() > 0.2499
    assert noise.min() < -0.2499
    assert float(noise.var()) == pytest.approx(0.25**2 / 3, rel=0.01)
    quarters = torch.histc(noise, 4, -0.25, 0.25) / weight.numel()
    assert (quarters - 0.25).abs().max() < 4 * 0.44 / math.sqrt(weight.numel())


@pytest.mark.parametrize(
    ("method", "expected"),
    # Residuals uniform in their cell; sigma or range of one half-width. Gaussian: the closed form of the paper's "about
    # 40 %"; both others: 2 * integral of f over f from 0 to one half.
    [("gaussian", 0.390), ("stochastic", 0.25), ("uniform", 0.25)],
)
def test_share_of_changed_symbols_has_its_closed_form(
    method: Method, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "_SAMPLED_WEIGHTS", 1 << 18)
    weight = flat_weight(512, 1024)
    int8 = get_format("int8-rowwise")
    amplitude = None if method == "stochastic" else half_width(weight, int8, "w")
    drawn = draw_with(weight, int8, method, 1, amplitude)
    assert drawn.share_changed == pytest.approx(expected, abs=0.005)
    assert drawn.sampled >= 1 << 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bnb-int8", "bnb-nf4", "torchao-int4", "quanto-float8"])
def test_share_of_changed_symbols_is_what_the_library_changes(
    name: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "_SAMPLED_WEIGHTS", 1 << 18)
    format = library_format(name)
    weight = flat_weight(256, 1024)
    amplitude = None if method == "stochastic" else half_width(weight, format, "w") / 4
    drawn = draw_with(weight, format, method, 1, amplitude)
    plain, _ = stored(quantize_with_library(name, weight), format, weight.shape)
    guarded, _ = stored(quantize_with_library(name, drawn.weight), format, weight.shape)
    assert drawn.sampled == weight.numel()
    # Noise may move a block's scale, and with it symbols that left no cell; stochastic rounding moves no scale.
    slack = 0 if method == "stochastic" else 0.02
    assert float((plain != guarded).double().mean()) == pytest.approx(drawn.share_changed, abs=slack)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["int8-rowwise", "nf4", "quanto-int4", "torchao-float8"])
@pytest.mark.parametrize("shape", [(96, 640), (67, 1055)], ids=str)
def test_threads_and_pieces_do_not_matter(
    name: str, method: Method, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(*shape)
    amplitude = None if method == "stochastic" else 0.003
    threads = torch.get_num_threads()
    results = []
    try:
        for count, piece in [(1, 1 << 18), (2, 1 << 18), (1, 4000), (2, 1)]:
            torch.set_num_threads(count)
            monkeypatch.setattr(format, "_CHUNK_WEIGHTS", piece)
            results.append(draw_with(weight, get_format(name), method, 9, amplitude).weight)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_the_weight_is_not_changed_and_the_dtype_is_the_callers() -> None:
    weight = random_weight(16, 64, torch.bfloat16)
    before = weight.clone()
    drawn = draw(weight, get_format("nf4"), "stochastic", RandomStream(0, "w"), dtype=torch.float32)
    assert torch.equal(weight, before)
    assert drawn.weight.dtype == torch.float32
    assert draw_with(weight, get_format("nf4"), "stochastic").weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_empty_tensors(shape: tuple[int, int], method: Method) -> None:
    weight = torch.empty(shape)
    assert half_width(weight, get_format("int8-rowwise"), "w") == 0
    drawn = draw_with(weight, get_format("int8-rowwise"), method, amplitude=0.1)
    assert drawn.weight.shape == weight.shape
    assert drawn.share_changed == drawn.sampled == 0


@pytest.mark.parametrize("name", ["int8-rowwise", "nf4", "torchao-int8", "quanto-int4", "quanto-float8", "gptq-4"])
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_weights_that_are_no_numbers(name: str, bad: float, word: str) -> None:
    weight = random_weight(16, 128)
    weight[3, 7] = bad
    message = rf"^model\.proj\.weight: 1 {word} weight\(s\), the first at \(3, 7\); [^\n]*$"
    with pytest.raises(WeightError, match=message):
        draw_with(weight, get_format(name), "gaussian", amplitude=0.1, name="model.proj.weight")
    with pytest.raises(WeightError, match=message):
        half_width(weight, get_format(name), "model.proj.weight")


def test_weights_beyond_the_quantizers_range() -> None:
    weight = random_weight(16, 128)
    weight[3, 7] = 1e5  # bitsandbytes casts to float16 first
    with pytest.raises(WeightError, match="too large for the quantizer's own precision"):
        draw_with(weight, get_format("int8-rowwise"), "stochastic")


def test_stochastic_rounding_refuses_an_unknown_grid() -> None:
    with pytest.raises(ValueError, match="use method='auto' or 'gaussian'"):
        draw_with(random_weight(16, 256), get_format("gguf-q4_k"), "stochastic")
    with pytest.raises(ValueError, match="bfloat16"):
        draw_with(random_weight(16, 128, torch.bfloat16), get_format("quanto-int8"), "stochastic")


@pytest.mark.parametrize("name", ["gptq-4", "gguf-q4_k", "int8-rowwise"])
def test_noise_per_cell_reaches_just_to_the_ends_of_each_weights_own_cell(name: str) -> None:
    if name.startswith("gguf"):
        pytest.importorskip("libgguf")
    format = get_format(name)
    weight = random_weight(64, 512) * torch.logspace(-3, 3, 64)[:, None]  # rows of very different scales
    moved = draw(weight, format, "uniform", RandomStream(0, "w"), half_widths=1.0, per_cell=True).weight - weight
    units = moved / format.quantize(weight).half_widths()
    assert float(units.abs().max()) <= 1.001
    assert float(units.std()) == pytest.approx(3**-0.5, rel=0.01)
    spread = units.view(64, -1).std(1)
    assert float(spread.min()) > 0.9 * 3**-0.5


def test_noise_per_cell_is_unbiased_on_a_grid_of_equal_steps() -> None:
    """Non-subtractive dither of a whole step: the mean of the rounded weight is the weight."""
    format = get_format("gptq-4")
    weight = random_weight(8, 128)
    quantized = format.quantize(weight)
    blocks, grid = format.blocks(weight), quantized.grid
    seeds, total = 4000, torch.zeros_like(blocks)
    for seed in range(seeds):
        moved = draw(weight, format, "uniform", RandomStream(seed, "w"), half_widths=1.0, per_cell=True).weight
        total += grid.decode(format.encode(format.blocks(moved), grid))
    inside = (quantized.block_codes > 1) & (quantized.block_codes < 14)
    error = (total / seeds - blocks) / grid.scale
    assert float(error[inside].abs().max()) < 5 * 0.5 / math.sqrt(seeds)


def test_noise_needs_an_amplitude() -> None:
    with pytest.raises(ValueError, match="gaussian noise needs an amplitude"):
        draw_with(random_weight(16, 128), get_format("int8-rowwise"), "gaussian")


MEMORY = """
from pathlib import Path
import torch
from optimum_qguard.formats import get_format
from optimum_qguard.guard import noise
from optimum_qguard.guard.noise import draw, half_width
from optimum_qguard.guard.random import RandomStream

def kilobytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

def run(weight):
    for name in ("int8-rowwise", "nf4", "quanto-int4", "torchao-float8"):
        for method in ("stochastic", "gaussian"):
            format = get_format(name)
            amplitude = None if method == "stochastic" else half_width(weight, format, "w")
            draw(weight, format, method, RandomStream(1, "w"), amplitude=amplitude)

noise.COMPILED_FROM = 0  # starting numba takes 100 MB, once
run(torch.randn(64, 4096))
weight = torch.empty(4096, 4096).normal_()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = kilobytes("VmRSS")
run(weight)
print((kilobytes("VmHWM") - before) * 1024 / weight.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak memory from /proc")
def test_peak_extra_memory_is_one_tensor() -> None:
    """The result, and beside it pieces that stay in the cache, whatever the tensor's size."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.5
