"""FP8 E4M3 and E5M2 (Micikevicius et al. 2022, arXiv:2209.05433) with one scale per tensor, row or tile.

Four libraries, four arithmetics; all set the scale from the block's absmax and round half to even, so they differ in
the last bit of the scale and on near-ties only:

=================  ==================================  =====================================
``arithmetic``     scale                               symbol
=================  ==================================  =====================================
``"float32"``      absmax / max, float32               float32(w) / scale
``"torchao"``      absmax / max in the weight's dtype  float32(w) / scale
``"quanto"``       absmax / max in the weight's dtype  w / scale in the weight's dtype
``"transformers"`` 1 / (max / absmax), float32         float32(w) · (max / absmax)
=================  ==================================  =====================================

where max is 448 (E4M3) or 57344 (E5M2). A scale rounded down puts the absmax weight just beyond the last symbol, where
all four clamp.

On-grid weights come back as their symbols in float32, bfloat16 and float16, provided that the dtype can hold them:
float16 has steps of 2⁻²⁴, too coarse for E4M3's subnormals where a block's absmax is below 448 · 2⁻¹⁵ = 0.014, and for
E5M2's nearly always (see `Float8.fixed_for`). An end symbol may lie beyond the absmax, by so little that it does not
move the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optimum_qguard.formats.absmax import absmax
from optimum_qguard.formats.format import Format, Quantized, WeightError, register
from optimum_qguard.formats.grid import Grid
from optimum_qguard.formats.reciprocal_grid import ReciprocalGrid

Arithmetic = Literal["float32", "torchao", "quanto", "transformers"]


@dataclass(frozen=True)
class Float8(Format):
    """One FP8 type, block layout and arithmetic. The alphabet is every finite FP8 value, with one zero.

    The end symbols' cells reach as far beyond them as the spacing there, half a step, so that the half-width is half
    the spacing everywhere; the quantizers clamp still further out.

    A block of zeros has scale 0 and codes 0 here. torchao and quanto divide 0 by 0 and store NaN in such rows.

    Attributes:
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        block: what shares a scale: ``"tensor"``, ``"row"``, ``"matrix"`` (a tensor, but one expert at a time), or the
            height and width of a tile, which must divide the matrix.
        arithmetic: see the module.
        power_of_two: round the scale up to a power of two (``FineGrainedFP8Config(scale_fmt="ue8m0")``); arithmetic
            ``"transformers"`` only.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    block: Literal["tensor", "row", "matrix"] | tuple[int, int] = "row"
    arithmetic: Arithmetic = "float32"
    power_of_two: bool = False

    def blocks(self, weight: Tensor) -> Tensor:
        self._check_tiles(weight.shape, "tensor")
        if weight.numel() == 0:
            return weight.reshape(0, 1)
        rows, columns = weight.shape[-2:]
        if self.block == "matrix":
            return weight.reshape(-1, rows * columns)
        if isinstance(self.block, str):
            return weight.reshape(-1, columns)
        height, width = self.block
        tiles = weight.reshape(-1, rows // height, height, columns // width, width)
        return tiles.transpose(2, 3).reshape(-1, height * width)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        if isinstance(self.block, str) or shape.numel() == 0:
            return blocks.reshape(shape)
        rows, columns = shape[-2:]
        height, width = self.block
        tiles = blocks.reshape(-1, rows // height, columns // width, height, width)
        return tiles.transpose(2, 3).reshape(shape)

    def grid(self, blocks: Tensor) -> Grid:
        alphabet = _alphabet(self.dtype).to(blocks.device)
        edges = _edges(alphabet)
        largest = torch.finfo(self.dtype).max
        greatest = absmax(blocks)
        if self.block == "tensor" and len(blocks):
            greatest = greatest.amax().expand(len(blocks), 1)
        if self.arithmetic in ("torchao", "quanto"):
            return Grid(alphabet, edges, (greatest / largest).float())
        greatest = greatest.float()
        if self.arithmetic == "float32":
            return Grid(alphabet, edges, greatest / largest)
        factor = torch.where(greatest > 0, largest / greatest, 1)
        scale = 1 / factor
        if self.power_of_two:
            scale = torch.exp2(scale.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil())
            factor = 1 / scale
        return ReciprocalGrid(alphabet, edges, torch.where(greatest > 0, scale, 0), factor=factor)

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        if isinstance(grid, ReciprocalGrid) and grid.factor is not None:
            units = blocks.float() * grid.factor
        elif self.arithmetic == "quanto":
            units = blocks / grid.scale.to(blocks.dtype)
        else:
            units = blocks.float() / grid.scale
        largest = torch.finfo(self.dtype).max
        bits = units.nan_to_num_(0, largest, -largest).clamp_(-largest, largest).to(self.dtype).view(torch.uint8)
        zero = len(grid.alphabet) // 2
        magnitude = bits & 0x7F
        return torch.where(bits > 0x7F, zero - magnitude, zero + magnitude)

    def fixed_for(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float16 or self.dtype == torch.float8_e4m3fn

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        self._check_tiles(weight.shape, name)
        return super().quantize(weight, name)

    def _check_tiles(self, shape: torch.Size, name: str) -> None:
        if len(shape) < 2:
            raise WeightError(f"{name}: has {len(shape)} dimension(s); FP8 weights have two (or three: experts)")
        if not isinstance(self.block, str) and (shape[-2] % self.block[0] or shape[-1] % self.block[1]):
            raise WeightError(
                f"{name}: {shape[-2]} x {shape[-1]} cannot be cut into tiles of {self.block[0]} x {self.block[1]}; "
                "transformers leaves such a weight unquantized: add its module to modules_to_not_convert, or choose "
                "a weight_block_size that divides it"
            )


def _alphabet(dtype: torch.dtype) -> Tensor:
    values = torch.arange(0x80, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]
    return torch.cat([-values[1:].flip(0), values])


def _edges(alphabet: Tensor) -> Tensor:
    middles = (alphabet[:-1] + alphabet[1:]) / 2
    end = 2 * alphabet[-1:] - middles[-1:]
    return torch.cat([-end, middles, end])


def _factory(
    dtype: torch.dtype,
    block: Literal["tensor", "row", "matrix"] | tuple[int, int],
    arithmetic: Arithmetic,
    power_of_two: bool = False,
) -> Callable[[], Format]:
    return lambda: Float8(dtype, block, arithmetic, power_of_two)


register("torchao-float8", _factory(torch.float8_e4m3fn, "row", "torchao"))
register("torchao-float8-tensor", _factory(torch.float8_e4m3fn, "tensor", "torchao"))
register("quanto-float8", _factory(torch.float8_e4m3fn, "row", "quanto"))
register("fp8-block", _factory(torch.float8_e4m3fn, (128, 128), "transformers"))
register("fp8-block-ue8m0", _factory(torch.float8_e4m3fn, (128, 128), "transformers", True))
register("fp8-e4m3-tensor", _factory(torch.float8_e4m3fn, "tensor", "float32"))
register("fp8-e4m3-row", _factory(torch.float8_e4m3fn, "row", "float32"))
register("fp8-e5m2-tensor", _factory(torch.float8_e5m2, "tensor", "float32"))
register("fp8-e5m2-row", _factory(torch.float8_e5m2, "row", "float32"))
