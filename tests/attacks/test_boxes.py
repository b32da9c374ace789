"""Whatever lies inside the boxes is, to every quantizer that they are for, the same weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.attacks.boxes import Boxes, boxes, dithered_boxes
from optimum_qguard.formats import get_format

FIXED = ["int8-rowwise", "nf4", "fp4", "gptq-4", "torchao-int8", "quanto-int8", "gguf-q4_0", "gguf-q5_1", "gguf-q8_0"]


def random_weight(seed: int, rows: int = 8, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def anywhere_in(box: Boxes, seed: int) -> Tensor:
    """Half of the weights at the boxes' ends, the others between."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(box.lower.shape, generator=generator)
    share = torch.where(torch.rand(share.shape, generator=generator) < 0.5, share.round(), share)
    return torch.minimum(torch.maximum(box.lower.lerp(box.upper, share), box.lower), box.upper)


@pytest.mark.parametrize("name", FIXED)
@given(seed=st.integers(0, 2**31), keep=st.sampled_from([0.3, 0.6, 0.8]))
def test_every_point_of_the_boxes_has_the_same_symbols(name: str, seed: int, keep: float) -> None:
    weight, format = random_weight(seed), get_format(name)
    box = boxes(weight, [format], keep=keep)
    moved = anywhere_in(box, seed + 1)
    before, after = format.quantize(weight), format.quantize(moved)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.grid.scale, after.grid.scale)
    assert 0 < box.share_frozen < 0.2


@given(seed=st.integers(0, 2**31))
def test_one_model_for_several_quantizers(seed: int) -> None:
    weight = random_weight(seed)
    formats = [get_format(name) for name in ("int8-rowwise", "nf4", "fp4")]
    box = boxes(weight, formats, keep=0.8)
    moved = anywhere_in(box, seed + 1)
    for format in formats:
        assert torch.equal(format.quantize(weight).codes, format.quantize(moved).codes)
    assert box.share_frozen < 0.5


def test_keep_is_the_share_of_the_way_from_the_symbol() -> None:
    weight = torch.tensor([[127.0, 10.2, -3.4, 0.0]])
    box = boxes(weight, [get_format("int8-rowwise")], keep=0.8)
    torch.testing.assert_close(box.lower, torch.tensor([[127.0, 9.6, -3.4, -0.4]]))
    torch.testing.assert_close(box.upper, torch.tensor([[127.0, 10.4, -2.6, 0.4]]))


def test_projection_is_a_clamp() -> None:
    weight = random_weight(0)
    box = boxes(weight, [get_format("nf4")])
    far = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.minimum(torch.maximum(far, box.lower), box.upper)
    assert torch.equal(box.project_(far.clone()), expected)


@pytest.mark.parametrize("name", ["int8-rowwise", "torchao-int8"])
@given(seed=st.integers(0, 2**31))
def test_known_randomness_leaves_room_too(name: str, seed: int) -> None:
    weight, format = random_weight(seed), get_format(name)
    blocks = format.blocks(weight)
    uniform = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed + 1))
    box = dithered_boxes(weight, format, uniform)
    moved = format.blocks(anywhere_in(box, seed + 2))
    grid = format.quantize(weight).grid
    before = grid.round_stochastically(blocks.clone(), uniform.clone()).clone()
    after = grid.round_stochastically(moved.clone(), uniform.clone())
    inside = blocks.abs() < 0.99 * blocks.abs().amax(1, keepdim=True)  # at the ends of the range, rounding clamps
    # Where the sum is a whole number up to arithmetic, who multiplies by the inverse may find another one.
    points = blocks / grid.scale + uniform
    clear = (points - points.round()).abs() > 1e-4
    free = format.blocks(box.lower != box.upper) & inside & clear
    assert torch.equal(before[free], after[free])
    assert float((box.upper - box.lower).median()) > 0.9 * float(grid.scale.min())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one format"):
        boxes(random_weight(0), [])
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        boxes(random_weight(0), [get_format("nf4")], keep=1.5)
    with pytest.raises(ValueError, match="no uniform grid"):
        dithered_boxes(random_weight(0), get_format("nf4"), torch.rand(16, 64))
