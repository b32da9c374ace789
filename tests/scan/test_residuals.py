"""Positions in cells: measured as the formats define them, even for clean weights, and only where that can be said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from optimum_qguard.formats import get_format
from optimum_qguard.scan.cells import CELLS
from optimum_qguard.scan.places import BINS
from optimum_qguard.scan.residuals import Histograms, histograms
from optimum_qguard.scan.sample import Sample


def sample_of(rows: Tensor) -> Sample:
    return Sample("tensor", "model.safetensors", tuple(rows.shape), rows, (0,), complete=True)


def look(rows: Tensor) -> Histograms:
    (found,) = histograms([sample_of(rows)])
    assert found is not None
    return found


def line(found: Histograms, label: str) -> int:
    return found.cells.index(next(index for index, cells in enumerate(CELLS) if cells.label == label))


def normal(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    "label", ["int8 rows", "int8 rows of torchao", "NF4", "GGUF Q5_0", "GGUF Q4_0", "GGUF Q5_1", "GGUF Q8_0"]
)
def test_a_position_is_the_distance_to_the_symbol(label: str) -> None:
    """Moved a share of the way to its cell's end, every weight lies at that position."""
    cells = next(cells for cells in CELLS if cells.label == label)
    format = get_format(cells.format)
    weights = normal(64, 512)
    quantized = format.quantize(weights)
    lower, upper = quantized.bounds()
    symbols = quantized.symbols()
    least, greatest = quantized.grid.extremes(format.blocks(weights))
    sets_scale = (format.blocks(weights) <= least) | (format.blocks(weights) >= greatest)
    end = torch.where(weights > symbols, upper, lower)
    moved = torch.where(format.unblock(sets_scale, weights.shape), weights, symbols.lerp(end, 0.7))
    found = look(moved)
    counts = found.counts[line(found, label)]
    at = round(0.7 * BINS)
    assert counts[at - 3 : at + 4].sum() > 0.97 * counts[1:].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [576, 2048])
def test_positions_of_clean_weights_are_even(dtype: torch.dtype, columns: int) -> None:
    found = look(normal((1 << 19) // columns, columns, dtype))
    for index, counts in zip(found.cells, found.counts, strict=True):
        if CELLS[index].steps == 0:
            continue  # symbols of unequal distance, or scales that a search fits to the weights
        quarters = counts[BINS // 8 :].reshape(7, -1).sum(1)
        assert quarters == pytest.approx(np.full(7, quarters.mean()), rel=0.06), CELLS[index].label
    assert (found.chi_square / found.freedom < 1 + 5 * np.sqrt(2 / found.freedom)).all()


def test_a_bfloat16_model_stored_in_float32_is_looked_at_as_one() -> None:
    weights = normal(64, 1024, torch.bfloat16)
    assert np.array_equal(look(weights).counts, look(weights.float()).counts)


def test_repeated_values_vary_more() -> None:
    weights = normal(64, 1024)
    weights = weights[:, ::8].repeat_interleave(8, dim=1)
    found = look(weights)
    at = line(found, "int8 rows")
    assert found.chi_square[at] / found.freedom[at] == pytest.approx(8, rel=0.15)


def test_repeated_rows_count_once() -> None:
    weights = normal(16, 1024)
    found, twice = look(weights), look(weights.repeat(2, 1))
    assert np.array_equal(found.counts[0, 1:], twice.counts[0, 1:])


def test_pieces_add_up() -> None:
    weights = normal(128, 512)
    whole = look(weights)
    first, second = (look(part) for part in weights.chunk(2))
    first.add(second)
    at = line(whole, "int8 rows")
    assert np.array_equal(first.counts[at], whole.counts[at])
    with pytest.raises(ValueError, match="different"):
        first.add(look(normal(128, 100)))


@pytest.mark.parametrize(
    "rows", [torch.zeros(64, 128), torch.full((64, 128), 0.5), torch.randn(64, 128) * torch.tensor([1e-9, 1.0] * 64)]
)
def test_odd_weights_are_no_trouble(rows: Tensor) -> None:
    found = look(rows)
    assert np.isfinite(found.chi_square).all()
    assert (found.counts.sum(1) > 0).all()


@pytest.mark.parametrize("shape", [(9,), (3, 5), (100_000,), (5000, 3)])
def test_tensors_that_say_nothing_are_left_out(shape: tuple[int, ...]) -> None:
    weights = torch.randn(shape)
    rows = weights.view(1, -1) if len(shape) == 1 else weights
    (found,) = histograms([Sample("tensor", "model.safetensors", shape, rows, (0,), complete=True)])
    assert found is None or all(CELLS[index].flat for index in found.cells)
