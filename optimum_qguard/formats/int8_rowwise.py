"""LLM.int8(): one absmax scale per output row, integers -127 to 127 (Dettmers et al. 2022, arXiv:2208.07339).

bitsandbytes casts the weight to float16, multiplies by ``127 / absmax`` in float32 and rounds half to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optimum_qguard.formats.absmax import absmax
from optimum_qguard.formats.format import Format, register
from optimum_qguard.formats.grid import Grid, midpoint_edges


@dataclass(frozen=True)
class Int8Rowwise(Format):
    """bitsandbytes' ``int8_vectorwise_quant``. Symbol ``c`` is the integer ``c - 127``."""

    def blocks(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.numel() // max(weight.shape[-1], 1), max(weight.shape[-1], 1))

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)

    def grid(self, blocks: Tensor) -> Grid:
        greatest = absmax(blocks)
        half = greatest.to(torch.float16).float()
        kept = torch.equal(half, greatest.float())
        return Grid(*_levels(blocks.device), half / 127, keeps_extremes=kept)

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        absmax = (grid.scale * 127).to(torch.float16).float()  # a float16 number, so this gives it back exactly
        factor = torch.where(absmax > 0, 127 / absmax, 0)
        return ((blocks.to(torch.float16) * factor).round() + 127).to(torch.uint8)


@cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    alphabet = torch.arange(-127.0, 128.0, device=device)
    return alphabet, midpoint_edges(alphabet)


register("int8-rowwise", Int8Rowwise)
