"""optimum-quanto's qint8, qint4 and qint2, as ``QuantoConfig`` uses them.

qint8 is symmetric, one scale absmax / 127 per output row. qint4 and qint2 are asymmetric over groups, with a shift in
floating point: the group's least weight is symbol 0. All arithmetic runs in the weight's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optimum_qguard.formats.absmax import absmax
from optimum_qguard.formats.affine_group import AffineGroup, extremes, signed_levels, unsigned_levels
from optimum_qguard.formats.format import register
from optimum_qguard.formats.grid import Grid


@dataclass(frozen=True)
class QuantoInt8(AffineGroup):
    """quanto's ``AbsmaxOptimizer`` and ``quantize_symmetric``. Symbol ``c`` is the integer ``c - 128``.

    The grid is fixed in float32 and float16 only. BF16 has 8 digits: beyond ±64 quotients are multiples of a half, and
    so rounded twice, the second time to even. One odd symbol in nine there is reached by no BF16 weight at all.
    """

    fixed_grid = False

    def fixed_for(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16

    def group_of(self, shape: torch.Size) -> int:
        return max(shape[-1], 1)

    def grid(self, blocks: Tensor) -> Grid:
        return Grid(*signed_levels(8, blocks.device), (absmax(blocks) / 127).float(), first=1)

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        units = blocks / grid.scale.to(blocks.dtype)
        return units.round_().nan_to_num_(0).clamp_(-128, 127).add_(128).to(torch.uint8)


@dataclass(frozen=True)
class QuantoIntGroup(AffineGroup):
    """quanto's ``MaxOptimizer`` and ``quantize_affine``.

    Groups are of 128 weights; where that does not divide a longer row, of 96, 64 or 32; where none does, and in rows of
    at most 128 weights, the row is the group. A weight of one row and one group gets a scale per weight (quanto reduces
    over the wrong dimension there): every cell then is a single value, and quantization loses nothing.

    Attributes:
        bits: 4 or 2.
    """

    bits: int = 4

    def group_of(self, shape: torch.Size) -> int:
        columns = shape[-1]
        for group in (128, 96, 64, 32):
            if columns > 128 and columns % group == 0:
                return group
        return 1 if len(shape) > 1 and shape[-2] == 1 else max(columns, 1)

    def grid(self, blocks: Tensor) -> Grid:
        low, high = extremes(blocks)
        scale = (high - low) / (2**self.bits - 1)
        return Grid(*unsigned_levels(self.bits, blocks.device), scale.float(), offset=low.float())

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        assert grid.offset is not None
        units = (blocks - grid.offset.to(blocks.dtype)) / grid.scale.to(blocks.dtype)
        return units.round_().nan_to_num_(0).clamp_(0, 2**self.bits - 1).to(torch.uint8)


register("quanto-int8", QuantoInt8)
register("quanto-int4", partial(QuantoIntGroup, 4))
register("quanto-int2", partial(QuantoIntGroup, 2))
