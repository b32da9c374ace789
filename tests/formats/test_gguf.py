import builtins
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import slack, weights
from torch import Tensor

from optimum_qguard.formats import WeightError, get_format
from optimum_qguard.formats.gguf import fallback_for

libgguf = pytest.importorskip("libgguf")
gguf_quants = pytest.importorskip("gguf.quants")

BLOCK_TYPES = ["gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0"]
K_QUANTS = ["gguf-q2_k", "gguf-q3_k", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k"]
IQ4_NL = "gguf-iq4_nl"
ALL = [*BLOCK_TYPES, *K_QUANTS, IQ4_NL]


def weights_for(name: str) -> st.SearchStrategy[Tensor]:
    unit = 256 if name in K_QUANTS else 32
    return weights(columns=st.integers(1, 4).map(lambda count: count * unit), experts=False) | weights(
        columns=st.just(unit), experts=True
    )


def ggml_type(name: str) -> Any:
    return libgguf.GGMLQuantizationType[name.removeprefix("gguf-").upper()]


def stored_by_ggml(name: str, weight: Tensor) -> Any:
    return libgguf.quantize_rows(weight.float().numpy(), ggml_type(name))


def decoded_by_ggml(name: str, weight: Tensor) -> Tensor:
    return torch.from_numpy(libgguf.dequantize_rows(stored_by_ggml(name, weight), ggml_type(name)))


def block_symbols(name: str, weight: Tensor) -> Tensor:
    """Symbols in ggml's own blocks of the 32-weight types, as integers from 0."""
    stored = torch.from_numpy(stored_by_ggml(name, weight)).reshape(-1, libgguf.type_size(ggml_type(name)))
    if name == "gguf-q8_0":
        return (stored[:, 2:].view(torch.int8).short() + 127).reshape(weight.shape)
    low = stored[:, -16:]
    symbols = torch.cat([low & 15, low >> 4], dim=1).short()
    if name.startswith("gguf-q5"):
        high = stored[:, -20:-16, None] >> torch.arange(8, dtype=torch.uint8) & 1
        symbols += high.reshape(-1, 32).short() * 16
    return symbols.reshape(weight.shape)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_symbols_of_block_types_are_ggmls(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights_for(name))
    assert torch.equal(get_format(name).quantize(weight).codes.short(), block_symbols(name, weight))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_values_are_what_ggml_and_the_gguf_package_decode(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights_for(name))
    quantized = get_format(name).quantize(weight, "w")
    assert torch.equal(quantized.dequantize(), decoded_by_ggml(name, weight))
    again = gguf_quants.dequantize(stored_by_ggml(name, weight), ggml_type(name))
    assert torch.equal(quantized.dequantize(), torch.from_numpy(again))


@pytest.mark.parametrize("name", K_QUANTS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_k_quants_round_to_their_stored_grid(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights_for(name))
    fmt = get_format(name)
    blocks = fmt.blocks(weight)
    quantized = fmt.quantize(weight)
    grid, codes = quantized.grid, quantized.block_codes
    alive = (grid.scale != 0).expand(codes.shape)
    assert torch.equal(torch.where(alive, fmt.encode(blocks, grid), codes), codes)
    half = slice(0, len(blocks) // 2)
    assert torch.equal(fmt.encode(blocks[half], grid[half]), fmt.encode(blocks, grid)[half])
    assert torch.equal(fmt.grid(blocks).scale, grid.scale)

    lower, upper = grid.bounds(codes)
    clamped = (codes == 0) | (codes == len(grid.alphabet) - 1)
    room = (
        4 * torch.finfo(torch.float32).eps * (blocks.float().abs() + (0 if grid.offset is None else grid.offset.abs()))
    )
    inside = (blocks.float() >= lower - room) & (blocks.float() <= upper + room)
    assert (inside | clamped | ~alive).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_iq4_nl_rounds_to_nearest_but_for_its_scales_rounding(data: st.DataObject) -> None:
    weight = data.draw(weights_for(IQ4_NL))
    fmt = get_format(IQ4_NL)
    quantized = fmt.quantize(weight)
    grid, codes, blocks = quantized.grid, quantized.block_codes, fmt.blocks(weight).float()
    nearest = fmt.encode(blocks, grid)
    units = torch.where(grid.scale != 0, blocks / grid.scale, 0)
    assert torch.equal(nearest, (units[..., None] - grid.alphabet).abs().argmin(-1)) or bool(
        torch.isin(units, grid.edges).any()
    )
    normal = (grid.scale.abs() > torch.finfo(torch.float16).tiny).expand(codes.shape)
    from_edge = (units[..., None] - grid.edges[1:-1]).abs().amin(-1)
    assert ((nearest == codes) | (from_edge <= 2**-11 * units.abs()) | ~normal).all()
    first = slice(0, len(blocks) // 2)
    assert torch.equal(fmt.encode(blocks[first], grid[first]), nearest[first])
    assert torch.equal(fmt.grid(blocks).scale, grid.scale)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_weights_lie_in_their_cells(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights_for(name))
    quantized = get_format(name).quantize(weight)
    lower, upper = quantized.bounds()
    offset = 0.0 if quantized.grid.offset is None else float(quantized.grid.offset.abs().amax())
    assert (weight.float() >= lower - slack(weight.float(), offset)).all()
    assert (weight.float() <= upper + slack(weight.float(), offset)).all()
    inside = lower + (upper - lower) * (0.01 + 0.98 * torch.rand(weight.shape))
    fmt = quantized.format
    telling = ((upper - lower).abs() > 400 * slack(weight.float(), offset)) & (quantized.half_widths() > 0)
    codes = fmt.unblock(fmt.encode(fmt.blocks(inside), quantized.grid), weight.shape)
    assert torch.equal(torch.where(telling, codes, 0), torch.where(telling, quantized.codes, 0))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ggml_returns_the_symbols_of_on_grid_weights(name: str, data: st.DataObject) -> None:
    weight = data.draw(weights_for(name))
    fmt = get_format(name)
    blocks = fmt.blocks(weight).float()
    grid = fmt.grid(fmt.blocks(weight))
    dtype = torch.finfo(weight.dtype)
    step_of_dtype = dtype.eps * blocks.abs().amax(1, keepdim=True).clamp(min=dtype.tiny)
    constant = blocks.amin(1, keepdim=True) == blocks.amax(1, keepdim=True)
    told_apart = constant | (grid.scale.abs() > step_of_dtype)
    rounded = pre_round(fmt, weight, data.draw(st.integers(0, 2**32)))
    assert rounded.weight.dtype == weight.dtype
    returned, chosen = fmt.blocks(block_symbols(name, rounded.weight)), fmt.blocks(rounded.codes)
    assert torch.equal(torch.where(told_apart, returned, 0), torch.where(told_apart, chosen, 0))


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q5_0"])
@pytest.mark.parametrize("first", [1.0, -1.0])
def test_the_first_of_two_largest_weights_sets_the_sign(name: str, first: float) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 20] = first, -first
    quantized = get_format(name).quantize(weight)
    assert torch.equal(quantized.codes.short(), block_symbols(name, weight))
    assert float(quantized.grid.scale) * first < 0


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_zero_size(name: str) -> None:
    zeros = get_format(name).quantize(torch.zeros(2, 512))
    assert not zeros.dequantize().any()
    assert not zeros.half_widths().any()
    for shape in [(0, 256), (4, 0), (0, 8, 256)]:
        empty = get_format(name).quantize(torch.zeros(shape, dtype=torch.bfloat16))
        assert empty.codes.shape == empty.dequantize().shape == torch.Size(shape)
        assert empty.median_half_width() == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_weights_name_the_tensor(name: str, bad: float) -> None:
    weight = torch.ones(4, 256)
    weight[2, 100] = bad
    with pytest.raises(WeightError, match=r"mlp\.down_proj\.weight: 1 .* \(2, 100\)"):
        get_format(name).quantize(weight, "mlp.down_proj.weight")


@pytest.mark.parametrize("name", ALL)
def test_weights_beyond_float16_scales_are_an_error(name: str) -> None:
    with pytest.raises(WeightError, match=r"huge\.weight: weights too large for GGUF's float16 scales"):
        get_format(name).quantize(torch.linspace(-1e9, 3e9, 512)[None], "huge.weight")


@pytest.mark.parametrize(
    ("name", "columns", "advice"),
    [
        ("gguf-q4_k", 576, r"q_proj\.weight: 576 columns, and gguf-q4_k needs a multiple of 256; .*gguf-q5_0"),
        ("gguf-q6_k", 100, r"q_proj\.weight: 100 columns, .*leaves it in float16"),
        ("gguf-q4_0", 100, r"q_proj\.weight: 100 columns, and gguf-q4_0 needs a multiple of 32; .*refuses"),
    ],
)
def test_incomplete_blocks_say_what_llama_cpp_does(name: str, columns: int, advice: str) -> None:
    with pytest.raises(WeightError, match=advice):
        get_format(name).quantize(torch.ones(4, columns), "q_proj.weight")


def test_fallbacks() -> None:
    expected = ["gguf-q4_0", "gguf-q4_0", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0"]
    assert [fallback_for(name, 576) for name in K_QUANTS] == expected
    assert [fallback_for(name, 2048) for name in ALL] == ALL
    assert fallback_for("gguf-q4_k", 100) is None
    with pytest.raises(WeightError, match="multiple of 32 columns, not 100"):
        fallback_for("gguf-q8_0", 100)
    with pytest.raises(ValueError, match="not a GGUF format; known: iq4_nl, q2_k"):
        fallback_for("nf4", 64)


def test_without_libgguf_only_types_with_a_search_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_libgguf(name: str, *rest: Any, **named: Any) -> Any:
        if name == "libgguf":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_libgguf)
    get_format("gguf-q4_0").quantize(torch.ones(1, 256))
    for name in ("gguf-q4_k", IQ4_NL):
        with pytest.raises(ImportError, match=r"pip install 'optimum-qguard\[gguf\]'"):
            get_format(name).quantize(torch.ones(1, 256))
