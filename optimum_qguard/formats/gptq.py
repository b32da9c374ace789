"""GPTQ's grid (Frantar et al. 2022, arXiv:2210.17323) as gptqmodel lays it.

GPTQ moves a group's weights while it quantizes the columns before it, and only then lays that group's grid. So the grid
here is that of the original weights: right for half-widths and cells, not a prediction of the symbols. Of weights that
lie on that grid already, only those that set a scale have an error that GPTQ could spread, half a step at most; so
nearly all others stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optimum_qguard.formats.affine_group import AffineGroup, extremes, signed_levels, unsigned_levels
from optimum_qguard.formats.format import register
from optimum_qguard.formats.grid import Grid


@dataclass(frozen=True)
class GPTQ(AffineGroup):
    """gptqmodel's ``Quantizer.find_params`` and ``quantize``, in float32 whatever the weight's dtype.

    A row's last group may be short. A symmetric group without negative weights gets steps half as wide, of which it
    can use the upper half: gptqmodel clips its greater weights.

    Attributes:
        bits: 2 to 8.
        group_size: -1 for one group per row.
        symmetric: ``sym`` of ``GPTQConfig``.
        act_order: ``desc_act``: groups are of columns in another order than they are stored in.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    fixed_grid = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is 2 to 8, not {self.bits}")

    def keeps_symbols(self, dtype: torch.dtype) -> bool:
        return self.group_size == -1 or not self.act_order

    def group_of(self, shape: torch.Size) -> int:
        return max(shape[-1], 1) if self.group_size == -1 else self.group_size

    def grid(self, blocks: Tensor) -> Grid:
        low, high = extremes(blocks)
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = torch.where(low < 0, -high, low)
        empty = (high == 0) & (low == 0)
        low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
        if self.symmetric:
            return Grid(*signed_levels(self.bits, blocks.device), scale, first=1)
        return Grid(*unsigned_levels(self.bits, blocks.device), scale, offset=(low / scale).round() * scale)

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        zero = 2 ** (self.bits - 1) if grid.offset is None else (-grid.offset / grid.scale).round_()
        units = (blocks.float() / grid.scale).round_()
        return units.add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)


for _bits in (2, 3, 4, 8):
    register(f"gptq-{_bits}", partial(GPTQ, _bits))
