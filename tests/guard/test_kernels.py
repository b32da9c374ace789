"""The compiled kernels are the torch code that they stand for, number for number."""

import math
import sys
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.formats import Format, WeightError, format, format_names, get_format
from optimum_qguard.guard import kernels, noise
from optimum_qguard.guard.float_bits import array, from_float, to_float
from optimum_qguard.guard.noise import Draw, Method, draw
from optimum_qguard.guard.random import RandomStream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (128, 256)  # that every format takes
KINDS = ["normal", "heavy tails", "symbols", "constant rows", "zero rows", "least numbers", "one row large"]


def can_round(name: str) -> bool:
    blocks = get_format(name).blocks(torch.ones(SHAPE))
    return kernels.can_move("stochastic", get_format(name).grid(blocks), blocks)


ROUNDED = [(name, dtype) for name in format_names() if can_round(name) for dtype in DTYPES]
ROUNDED = [(name, dtype) for name, dtype in ROUNDED if get_format(name).fixed_for(dtype)]


@st.composite
def weights(draw: st.DrawFn, format: Format, dtype: torch.dtype) -> Tensor:
    """Odd shapes where the format takes them, and what float arithmetic trips over."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 300)))
    try:
        format.blocks(torch.empty(shape))
    except WeightError:
        shape = SHAPE
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.02, 1.0, 30.0]))
    kind = draw(st.sampled_from(KINDS))
    if kind == "heavy tails":
        weight *= torch.randn(shape, generator=generator).exp()
    elif kind == "symbols":
        weight = format.quantize(weight).symbols()
    elif kind == "constant rows":
        weight[::2] = weight[::2, :1].clone()
    elif kind == "zero rows":
        weight[::2] = 0
    elif kind == "least numbers":
        weight *= torch.finfo(dtype).smallest_normal * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    elif kind == "one row large":
        weight[0] *= 1e3
    return weight.clamp(-6e4, 6e4).to(dtype)


def draw_with(
    kernels: bool, weight: Tensor, format: Format, method: Method, seed: int, dtype: torch.dtype, **options: Any
) -> Draw:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "COMPILED_FROM", 0 if kernels else torch.inf)
        return draw(weight, format, method, RandomStream(seed, "w"), dtype=dtype, **options)


def assert_same(first: Tensor, second: Tensor) -> None:
    assert first.dtype == second.dtype
    assert torch.equal(first, second), (first[first != second], second[first != second])


def test_the_formats_with_kernels() -> None:
    assert {"int8-rowwise", "torchao-int8", "quanto-int8", "nf4", "nf4-double", "fp4", "mxfp4", "nvfp4"} <= {
        name for name, _ in ROUNDED
    }
    blocks = get_format("int8-rowwise").blocks(torch.randn(256, 128).t())
    assert not kernels.can_move("stochastic", get_format("int8-rowwise").grid(blocks), blocks), "not contiguous"


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**256 - 1))
def test_stochastic_rounding(name: str, dtype: torch.dtype, data: st.DataObject, seed: int) -> None:
    format = get_format(name)
    weight = data.draw(weights(format, dtype))
    out = data.draw(st.sampled_from([dtype, torch.float16]))
    pair = [draw_with(compiled, weight, format, "stochastic", seed, out) for compiled in (True, False)]
    assert_same(pair[0].weight, pair[1].weight)
    assert pair[0].share_changed == pair[1].share_changed


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("word", [-(2**15), 2**15 - 1])
@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
def test_what_sets_the_scale_stays_whatever_is_drawn(
    name: str, dtype: torch.dtype, word: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomStream, "words", lambda self, start, count: torch.full((count,), word, dtype=torch.int16))
    format = get_format(name)
    weight = (0.02 * torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    drawn = draw_with(compiled, weight, format, "stochastic", 0, dtype).weight
    assert torch.equal(format.grid(format.blocks(drawn)).scale, format.grid(format.blocks(weight)).scale)


@pytest.mark.parametrize("method", ["gaussian", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**256 - 1), amplitude=st.floats(0, 100))
def test_noise(method: Method, dtype: torch.dtype, data: st.DataObject, seed: int, amplitude: float) -> None:
    format = get_format(data.draw(st.sampled_from(["quanto-int8", "quanto-int4", "gptq-4", "torchao-float8"])))
    weight = data.draw(weights(format, dtype))
    options: dict[str, Any] = {"amplitude": amplitude}
    if method == "uniform" and data.draw(st.booleans()):
        options = {"half_widths": data.draw(st.sampled_from([0.5, 1.0])), "per_cell": True}
    pair = [draw_with(compiled, weight, format, method, seed, dtype, **options) for compiled in (True, False)]
    assert_same(pair[0].weight, pair[1].weight)


@pytest.mark.parametrize("method", ["stochastic", "gaussian", "uniform"])
@pytest.mark.parametrize("name", ["int8-rowwise", "nf4"])
def test_threads_and_pieces_do_not_matter(name: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(67, 1055, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = draw_with(False, weight, get_format(name), method, 7, torch.bfloat16, half_widths=1.0)
    before = torch.get_num_threads()
    try:
        for threads, piece in [(1, 1 << 18), (2, 4000), (3, 1)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(format, "_CHUNK_WEIGHTS", piece)
            drawn = draw_with(True, weight, get_format(name), method, 7, torch.bfloat16, half_widths=1.0)
            assert_same(drawn.weight, expected.weight)
    finally:
        torch.set_num_threads(before)


@numba.njit
def read(values: Any, out: Any) -> None:
    for index in range(values.size):
        out[index] = to_float(values[index])


@numba.njit
def write(values: Any, out: Any) -> None:
    for index in range(values.size):
        out[index] = from_float(values[index], out[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_is_read(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).short().view(dtype)
    out = torch.empty(len(values))
    read(array(values), array(out))
    assert torch.equal(out.nan_to_num(7.0), values.float().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_rounded_half_to_even(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16 if dtype == torch.float32 else dtype).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:].double() / 2 + every[:-1].double() / 2).float()
    infinity = torch.tensor(torch.inf)
    values = torch.cat([every, ties, ties.nextafter(infinity), ties.nextafter(-infinity), infinity[None]])
    out = torch.empty(len(values), dtype=dtype)
    write(array(values), array(out))
    assert_same(out, values.to(dtype))


def test_large_tensors_alone_start_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, kernels.__name__)
    side = math.isqrt(noise.COMPILED_FROM)
    for rows, started in [(side - 1, False), (side, True)]:
        draw(torch.ones(rows, side), get_format("int8-rowwise"), "stochastic", RandomStream(1, "w"))
        assert (kernels.__name__ in sys.modules) == started


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "COMPILED_FROM", 0)
    monkeypatch.delitem(sys.modules, kernels.__name__)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert noise._kernels(1) is None
    draw(torch.randn(16, 64), get_format("nf4"), "stochastic", RandomStream(1, "w"))


def test_without_a_folder_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def double(values: Any) -> None:
        for index in range(values.size):
            values[index] *= 2

    values = np.ones(3, np.float32)
    kernels._compiled(double)(values)
    assert values.tolist() == [2, 2, 2]
