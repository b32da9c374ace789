import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pre_rounding import pre_round
from strategies import weights
from torch import Tensor

from optimum_qguard.formats import get_format

INT8 = get_format("int8-rowwise")


@given(weights())
def test_codes_and_values_are_those_of_bitsandbytes(weight: Tensor) -> None:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    quantized = INT8.quantize(weight)
    assert torch.equal(quantized.codes.short() - 127, codes.short())
    torch.testing.assert_close(quantized.dequantize(), bnb.int8_vectorwise_dequant(codes, absmax), rtol=1e-6, atol=0)


@given(weights(), st.integers(0, 2**32))
def test_bitsandbytes_gives_pre_rounded_symbols_back(weight: Tensor, seed: int) -> None:
    rounded = pre_round(INT8, weight, seed)
    codes, _, _ = bnb.int8_vectorwise_quant(rounded.weight.half())
    assert torch.equal(codes.short() + 127, rounded.codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_codes_on_cuda() -> None:
    weight = torch.randn(257, 511, device="cuda", dtype=torch.bfloat16)
    codes, _, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(INT8.quantize(weight).codes.short() - 127, codes.short())
