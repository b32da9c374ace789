"""One 8-bit code per weight whose top bits are the codes of fewer bits.

A group of weights of a row spans 256 equal cells of width ``scale`` from ``origin`` on, and a weight's code is the
number of its cell. Dropping the lowest bits merges neighbouring cells, so the top b bits are exactly the code on a grid
of 2^b cells over the same span. A symbol stands for the middle of its cell, and therefore no weight is further from its
value than half a cell: range/2^(b+1), less than the range/(2(2^b − 1)) of rounding to 2^b points from the least weight
to the greatest.

Below 8 bits, where cells are wide and weights are not spread evenly in them, values are corrected by a line per row and
width, fitted to the original weights by least squares. Position u within the span, in cells of 8 bits, becomes
``128 + shift + (1 + gain)(u − 128)``.

Related: Any-Precision LLM (ICML 2024) and Matryoshka Quantization (2025), which nest codes with codebooks and training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.precision.errors import PrecisionError

MAXIMUM, MINIMUM = 8, 2
_CELLS = 2**MAXIMUM
_MIDDLE = _CELLS / 2
_LEAST_GROUP = 16
_LARGEST_WEIGHT = 1e38  # the span of a group, rounded outwards to BF16, is then finite
_TILE = 1 << 20
"""Weights that are decoded at a time on the CPU. 4 MiB of them stay in a processor's cache until they are used, and the
allocator hands out the same memory again, while larger blocks come from the system page by page."""


@dataclass(frozen=True)
class NestedCodes:
    """A weight of shape ``(out, in)`` at every width.

    Floating-point numbers are BF16 held by their bits, so that casting a model changes none of them.

    Attributes:
        codes: ``(out, in)`` uint8.
        grid: ``(2, out, groups)`` int16: each group's origin and scale.
        line: ``(7, 2, out)`` int16: each row's gain and shift for 8 bits (zeros), 7, … 2.
    """

    codes: Tensor
    grid: Tensor
    line: Tensor

    def dequantize(self, bits: int) -> Tensor:
        """``(out, in)`` float32: the values at one width, 2 to 8."""
        return dequantize(self.codes, self.grid, self.line, bits)


def dequantize(codes: Tensor, grid: Tensor, line: Tensor, bits: int) -> Tensor:
    """``(out, in)`` float32: the values of the top ``bits`` bits. Arguments are what `NestedCodes` holds."""
    return _decoded(codes, bits, *_slope_and_start(grid, line, bits))


def tiles(codes: Tensor, grid: Tensor, line: Tensor, bits: int) -> Iterator[Tensor]:
    """What `dequantize` gives, some rows at a time, ``(rows, in)`` float32 from the first row on: on the CPU about a
    million weights, on other devices everything at once."""
    rows = max(1, _TILE // codes.shape[1]) if codes.device.type == "cpu" else len(codes)
    slope, start = _slope_and_start(grid, line, bits)
    for first in range(0, len(codes), rows):
        part = slice(first, first + rows)
        yield _decoded(codes[part], bits, slope[part], start[part])


def _slope_and_start(grid: Tensor, line: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``(out, groups, 1)`` each: values are ``start + slope · code``, with zeros for the lowest bits of the code."""
    origin, scale = grid.view(torch.bfloat16).float().unsqueeze(-1)
    gain, shift = line[MAXIMUM - bits].view(torch.bfloat16).float()[:, :, None, None]
    slope = 1 + gain
    middle = 2 ** (MAXIMUM - bits) / 2
    return scale * slope, torch.addcmul(origin, scale, slope * (middle - _MIDDLE) + shift + _MIDDLE)


def _decoded(codes: Tensor, bits: int, slope: Tensor, start: Tensor) -> Tensor:
    kept = codes if bits == MAXIMUM else codes & (_CELLS - 2 ** (MAXIMUM - bits))
    # In place: fresh memory would cost more than the arithmetic.
    return kept.view(*slope.shape[:2], -1).float().mul_(slope).add_(start).view(codes.shape)


def group_size_of(columns: int, group_size: int | None) -> int:
    """How many weights of a row of ``columns`` share a grid: the greatest divisor up to ``group_size``.

    Raises:
        PrecisionError: it would be below 16, where grids take more room than low widths save.
    """
    if group_size is None or group_size >= columns:
        return columns
    found = next(size for size in range(group_size, 0, -1) if columns % size == 0)
    if found < _LEAST_GROUP:
        raise PrecisionError(
            f"{columns} input features have no divisor from {_LEAST_GROUP} to the group size {group_size}: choose a "
            "larger group_size, or None for whole rows"
        )
    return found


def check_weight(weight: Tensor) -> None:
    """Raise `PrecisionError` for weights that `encode` cannot take: none at all, not finite, or beyond 1e38."""
    if weight.numel() == 0:
        raise PrecisionError(f"a weight of shape {tuple(weight.shape)} has nothing to quantize: give its layer null")
    largest = weight.abs().max()
    if not largest.isfinite():
        raise PrecisionError("weights that are not finite cannot be quantized; the checkpoint is damaged")
    if largest > _LARGEST_WEIGHT:
        raise PrecisionError("weights near the largest BF16 number cannot be quantized; the checkpoint is damaged")


@torch.no_grad()
def encode(weight: Tensor, group_size: int) -> NestedCodes:
    """Nested codes of a weight.

    Args:
        weight: ``(out, in)`` floating point, as `check_weight` wants it.
        group_size: weights of a row that share a grid; it divides ``in``.
    """
    blocks = weight.float().reshape(len(weight), -1, group_size)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    # Rounded outwards, so that the span still has every weight in it.
    origin = -_rounded_up(-low)
    scale = _rounded_up((high - origin) / _CELLS).clamp_(min=torch.finfo(torch.bfloat16).smallest_normal)
    positions = (blocks - origin) / scale
    codes = positions.floor().clamp_(0, _CELLS - 1).to(torch.uint8)
    lines = [_line(positions, codes, scale, bits) for bits in range(MAXIMUM - 1, MINIMUM - 1, -1)]
    lines = [torch.zeros_like(lines[0]), *lines]
    grid = torch.stack([origin, scale]).squeeze(-1)
    return NestedCodes(codes.view(weight.shape), _bits_of(grid), _bits_of(torch.stack(lines)))


def _line(positions: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``(2, out)`` gain and shift of the line through ``(position of the symbol, position)`` with the least squared
    error in weights, for each row."""
    dropped = MAXIMUM - bits
    x = ((codes >> dropped).float() + 0.5) * 2**dropped - _MIDDLE
    y = positions - _MIDDLE
    # In units of the row's largest scale, whose square may be too small for float32.
    importance = (scale / scale.amax(1, keepdim=True)).square()
    total = importance.sum((1, 2)) * x.shape[-1]
    mean_x, mean_y = (importance * x).sum((1, 2)) / total, (importance * y).sum((1, 2)) / total
    x, y = x - mean_x[:, None, None], y - mean_y[:, None, None]
    variance, covariance = (importance * x * x).sum((1, 2)), (importance * x * y).sum((1, 2))
    gain = torch.where(variance > 0, covariance / variance, 1.0) - 1
    gain = gain.to(torch.bfloat16).float()
    return torch.stack([gain, mean_y - (1 + gain) * mean_x])


def _rounded_up(values: Tensor) -> Tensor:
    """The least BF16 number that is not below, as float32."""
    near = values.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < values, above, near).float()


def _bits_of(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).contiguous().view(torch.int16)
