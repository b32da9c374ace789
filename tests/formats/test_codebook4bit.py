import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import weights
from torch import Tensor

from optimum_qguard.formats import get_format
from optimum_qguard.formats.buckets import bucketize
from optimum_qguard.formats.codebook4bit import Codebook4Bit

FORMATS = st.builds(
    Codebook4Bit,
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 128, 1024]),
    double_quant=st.booleans(),
)


def library(format: Codebook4Bit, weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' symbols, as indices into the sorted alphabet, and the values it decodes."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=format.block_size, quant_type=format.quant_type, compress_statistics=format.double_quant
    )
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    alphabet = format.grid(weight.new_zeros(0, format.block_size)).alphabet
    codes = torch.searchsorted(alphabet, bnb.get_4bit_type(format.quant_type, weight.device)[nibbles.long()])
    state.dtype = torch.float32
    state.shape = torch.Size([1, 2 * packed.numel()])  # bitsandbytes compiles a kernel for each odd shape
    values = bnb.dequantize_4bit(packed, state).flatten()[: weight.numel()]
    return codes.view(weight.shape), values.view(weight.shape)


def divides_near_tie(format: Codebook4Bit, weight: Tensor) -> Tensor:
    """Weights of an incomplete last block whose symbol hangs on a division's last bit (see the module)."""
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    distance = (blocks.float() / grid.scale).unsqueeze(-1) - grid.edges
    near = (distance.abs() < 1e-6).any(-1)
    if weight.numel() % format.block_size:
        near[:-1] = False
    else:
        near[:] = False
    return format.unblock(near, weight.shape)


@given(FORMATS, weights())
def test_codes_and_values_are_those_of_bitsandbytes(format: Codebook4Bit, weight: Tensor) -> None:
    codes, values = library(format, weight)
    quantized = format.quantize(weight)
    agree = (quantized.codes == codes) | divides_near_tie(format, weight)
    assert agree.all()
    agree = quantized.codes == codes
    torch.testing.assert_close(quantized.dequantize()[agree], values[agree], rtol=1e-6, atol=1e-37)


@given(FORMATS, weights(), st.integers(0, 2**32))
def test_bitsandbytes_gives_pre_rounded_symbols_back(format: Codebook4Bit, weight: Tensor, seed: int) -> None:
    rounded = pre_round(format, weight, seed)
    codes, _ = library(format, rounded.weight)
    assert torch.equal(codes.short(), rounded.codes)


def test_double_quantization_changes_what_is_decoded_but_no_symbol() -> None:
    weight = torch.randn(64, 256)
    plain, double = get_format("nf4").quantize(weight), get_format("nf4-double").quantize(weight)
    assert torch.equal(plain.codes, double.codes)
    assert not torch.equal(plain.dequantize(), double.dequantize())


def test_unknown_parameters() -> None:
    with pytest.raises(ValueError, match="block size 48"):
        Codebook4Bit(block_size=48)
    with pytest.raises(ValueError, match="'nf5'"):
        Codebook4Bit("nf5")  # type: ignore[arg-type]


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20, unique=True),
    st.lists(st.floats(-9, 9, width=32), max_size=30),
    st.booleans(),
)
def test_bucketize_is_torch_bucketize(boundaries: list[float], values: list[float], right: bool) -> None:
    edges = torch.tensor(sorted(boundaries))
    numbers = torch.cat([torch.tensor(values), edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    assert torch.equal(bucketize(numbers, edges, right=right).long(), torch.bucketize(numbers, edges, right=right))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-double", "fp4-double"])
def test_codes_on_cuda(name: str) -> None:
    format = get_format(name)
    assert isinstance(format, Codebook4Bit)
    weight = torch.randn(257, 511, device="cuda", dtype=torch.bfloat16)
    codes, values = library(format, weight)
    quantized = format.quantize(weight)
    assert torch.equal(quantized.codes.long(), codes)
    torch.testing.assert_close(quantized.dequantize(), values, rtol=1e-6, atol=1e-37)
