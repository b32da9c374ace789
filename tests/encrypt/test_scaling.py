"""Multiplying by powers of two: exactly, or not at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.scaling import InexactError, Scaling, scalings
from optimum_qguard.encrypt.sites import Part, Site

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.sampled_from(DTYPES), st.integers(0, 2**32), st.integers(1, 5))
def test_rows_in_pieces_are_the_product(dtype: torch.dtype, seed: int, step: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(7, 4, generator=generator) - 0.5).clamp_(min=0.1).to(dtype)
    rows, columns = (torch.randint(-3, 4, size, generator=generator) for size in [(7, 1), (1, 4)])
    scaling = Scaling("w", [rows, columns, columns])
    pieces = [scaling.apply(weight[start : start + step].clone(), start) for start in range(0, 7, step)]
    expected = weight.double() * 2.0 ** (rows + 2 * columns)
    assert torch.equal(torch.cat(pieces).double(), expected)
    assert torch.equal(scaling.apply(torch.cat(pieces), 0, inverse=True), weight)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)])
@given(st.data())
def test_whatever_the_bits_the_product_is_exact_or_refused(dtype: torch.dtype, bits: int, data: st.DataObject) -> None:
    """Zeros, infinities and subnormal numbers among them, and numbers that scaling makes so."""
    words = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=6))
    exponent = data.draw(st.integers(-40, 40))
    integers = torch.int16 if bits == 16 else torch.int32
    weight = (torch.tensor(words) - 2 ** (bits - 1)).to(integers).view(dtype)
    limits, expected = torch.finfo(dtype), weight.double() * 2.0**exponent
    scaling = Scaling("w", [torch.full((len(words),), exponent)])
    lost = (expected.abs() < limits.smallest_normal) & (expected != weight.double())
    if bool((lost | (expected.abs() > limits.max) & weight.isfinite() | ~weight.isfinite()).any()):
        with pytest.raises(InexactError):
            scaling.apply(weight.clone(), 0)
    else:
        scaled = scaling.apply(weight.clone(), 0)
        assert torch.equal(scaled.double(), expected)
        assert torch.equal(scaling.apply(scaled, 0, inverse=True).view(integers), weight.view(integers))


def test_what_all_sites_do_to_a_tensor() -> None:
    columns = Site(
        "a", "norm", 2, (Part("w", torch.tensor([[0, 1, -1]]), False), Part("g", torch.tensor([0, 1]), True))
    )
    rows = Site("b", "key", 1, (Part("w", torch.tensor([[0], [-1]]), True),))
    found = scalings([columns, rows], lambda site: torch.tensor([3, -2] if site.name == "a" else [5]))
    assert found.keys() == {"w", "g"}
    assert found["w"].apply(torch.ones(2, 3), 0).log2().tolist() == [[-2, -7, -5], [3, -2, 0]]
    assert found["g"].apply(torch.ones(2), 0).log2().tolist() == [-3, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("power", "exponent"), [("largest", 1), ("least", -1)])
def test_overflow_and_underflow_are_refused(dtype: torch.dtype, power: str, exponent: int) -> None:
    limits = torch.finfo(dtype)
    extreme = limits.max if power == "largest" else limits.smallest_normal
    weight = torch.tensor([[1.0, 0.0], [-extreme, 1.0]], dtype=dtype)
    scaling = Scaling("some.weight", [torch.tensor([[exponent, 0]])])
    with pytest.raises(InexactError):
        scaling.apply(weight.clone(), 0)
    assert torch.equal(scaling.apply(weight[:1].clone(), 0)[0], torch.tensor([2.0**exponent, 0.0], dtype=dtype))
    with pytest.raises(EncryptError, match=r"some.weight: the weight \S+ at \(1, 0\)"):
        raise scaling.explain(weight)


def test_the_largest_safe_strength_is_safe() -> None:
    """And one more is not."""
    weight = torch.tensor([[2.0**-10, 1.0, 3.0]], dtype=torch.float16)  # the least normal number is 2**-14
    message = str(Scaling("w", [torch.tensor([[-5, 0, 0]])]).explain(weight))
    assert "strength of at most 4" in message
    for exponent in (4, -4):
        Scaling("w", [torch.tensor([[exponent, exponent, exponent]])]).apply(weight.clone(), 0)
    with pytest.raises(InexactError):
        Scaling("w", [torch.tensor([[-5, -5, -5]])]).apply(weight.clone(), 0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_subnormal_weight_that_became_normal_comes_back(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    weight = torch.tensor([limits.smallest_normal / 2, -limits.smallest_normal / 2, 0.0, -0.0, 1.0], dtype=dtype)
    scaling = Scaling("w", [torch.tensor([4, 4, 4, 4, -4])])
    back = scaling.apply(scaling.apply(weight.clone(), 0), 0, inverse=True)
    assert torch.equal(back, weight)
    assert torch.equal(back.signbit(), weight.signbit())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_is_named(value: float) -> None:
    weight = torch.tensor([[1.0, 2.0**-120], [value, 1.0]])
    scaling = Scaling("w", [torch.tensor([[9, -9]])])
    with pytest.raises(InexactError):
        scaling.apply(weight.clone(), 0)
    assert str(scaling.explain(weight)).startswith(f"w: the weight {value} at (1, 0) is no finite number; ")


@pytest.mark.parametrize(
    ("dtype", "wider"), [(torch.float16, "float32"), (torch.bfloat16, "float64"), (torch.float32, "float64")]
)
def test_the_error_names_the_factor_and_a_wider_dtype(dtype: torch.dtype, wider: str) -> None:
    """An overflow and what is too small for the dtype too."""
    for exponent, factor in ((2, "4"), (-2, "0.25")):
        limits = torch.finfo(dtype)
        weight = torch.tensor([limits.max if exponent > 0 else limits.smallest_normal], dtype=dtype)
        message = str(Scaling("w", [torch.tensor([exponent])]).explain(weight))
        assert f"cannot be multiplied by {factor} exactly in" in message
        assert message.endswith(f"convert the checkpoint to {wider}")


def test_nothing_safe() -> None:
    weight = torch.tensor([1e-7], dtype=torch.float16)  # subnormal
    with pytest.raises(EncryptError, match=r"exactly in float16; convert the checkpoint to float32"):
        raise Scaling("w", [torch.tensor([-3])]).explain(weight)
