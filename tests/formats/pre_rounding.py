"""Pre-rounding as the guard does it, for tests that ask whether a quantizer gives the chosen symbols back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.formats import Format


@dataclass
class PreRounded:
    """``weight`` in its own dtype, pre-rounded; ``codes``: what must come back (int16, the weight's shape)."""

    weight: Tensor
    codes: Tensor


def pre_round(format: Format, weight: Tensor, seed: int) -> PreRounded:
    """Move each weight to a neighbouring symbol by chance; each block's extremes stay where they are."""
    blocks = format.blocks(weight)
    grid = format.grid(blocks)
    below, fraction = grid.neighbour_below(blocks.float())
    uniform = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed))
    chosen = below + (uniform < fraction)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    absmax = torch.maximum(-low, high)
    kept = (blocks == low) | (blocks == high) | (blocks.abs() == absmax)
    moved = torch.where(kept, blocks, grid.on_grid(chosen).to(blocks.dtype))
    codes = torch.where(kept, format.encode(blocks, grid).short(), chosen.short())
    return PreRounded(format.unblock(moved, weight.shape), format.unblock(codes, weight.shape))
