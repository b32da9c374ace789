"""The room that an attacker has: how far each weight may move before a quantizer gives it another symbol.

Source: Egashira et al. 2024 (arXiv:2405.18137), section 3; the intersection over several quantizers is theirs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.formats import Format, Quantized


@dataclass(frozen=True)
class Boxes:
    """An interval for each weight of a tensor; float32, shaped like it.

    Attributes:
        lower: where it begins.
        upper: where it ends; equal to ``lower`` where the weight is frozen.
    """

    lower: Tensor
    upper: Tensor

    @property
    def share_frozen(self) -> float:
        """Share of the weights that cannot move at all."""
        return float((self.lower == self.upper).double().mean())

    def project_(self, weight: Tensor) -> Tensor:
        """Clamp ``weight`` into the boxes, in place."""
        return weight.clamp_(self.lower, self.upper)


def boxes(weight: Tensor, formats: Sequence[Format], *, keep: float = 0.8, name: str = "tensor") -> Boxes:
    """Within these boxes ``weight`` keeps its symbols in every one of ``formats``.

    The weights that set a block's scale are frozen, so that the grids stay where they are; so are those that the boxes
    of two formats leave no common room.

    Args:
        weight: as the quantizer sees it, see `Format`.
        formats: at least one.
        keep: the share of the way from a symbol to the ends of its cell that the weight may use. 0.8 is the usual
            attacker's ±0.4 of an int8 step; one who expects noise stays nearer to the symbols. LLM.int8() rounds
            weights to float16 first, so more than 0.85 may lose the symbols of the largest.
        name: what errors call the tensor.

    Raises:
        WeightError: see `Format.quantize`.
        ValueError: no formats, or ``keep`` not between 0 and 1.
    """
    if not formats:
        raise ValueError("give at least one format whose symbols the boxes are to keep")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is above 0 and at most 1")
    lower = torch.full(weight.shape, -torch.inf, device=weight.device)
    upper = torch.full(weight.shape, torch.inf, device=weight.device)
    frozen = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for format in formats:
        quantized = format.quantize(weight, name)
        low, high = quantized.bounds()
        symbol = quantized.symbols()
        least, greatest = _extremes(weight, quantized)
        # Not even by a rounding error may another weight become the one that sets the scale.
        lower = torch.maximum(lower, symbol.lerp(low, keep).clamp(least, greatest))
        upper = torch.minimum(upper, symbol.lerp(high, keep).clamp(least, greatest))
        frozen |= (weight == least) | (weight == greatest)
    frozen |= lower > upper
    return Boxes(torch.where(frozen, weight, lower), torch.where(frozen, weight, upper))


def dithered_boxes(weight: Tensor, format: Format, uniform: Tensor, *, name: str = "tensor") -> Boxes:
    """The same for unbiased rounding whose randomness the attacker knows: a fixed seed is no defence.

    Args:
        weight: as the quantizer sees it.
        format: one whose grid is uniform.
        uniform: the numbers on (0, 1) that rounding will use, shaped like the format's blocks of ``weight``:
            ``floor(weight / scale + uniform)`` is the symbol.
        name: what errors call the tensor.

    Raises:
        WeightError: see `Format.quantize`.
        ValueError: a grid that is not uniform.
    """
    quantized = format.quantize(weight, name)
    grid = quantized.grid
    if not grid.is_uniform:
        raise ValueError(f"{format} has no uniform grid")
    scale = grid.scale if grid.decode_scale is None else grid.decode_scale
    offset = 0 if grid.offset is None else grid.offset if grid.decode_offset is None else grid.decode_offset
    units = (format.blocks(weight).float() - offset) / scale.where(scale != 0, torch.inf)
    symbol = (units + uniform).floor()
    # A hundredth of a step off each side, for the arithmetic of who rounds.
    ends = torch.stack([symbol - uniform + 0.01, symbol - uniform + 0.99]) * scale + offset
    lower, upper = (format.unblock(end, weight.shape) for end in (ends.amin(0), ends.amax(0)))
    least, greatest = _extremes(weight, quantized)
    frozen = (weight == least) | (weight == greatest)
    lower, upper = lower.clamp(least, greatest), upper.clamp(least, greatest)
    return Boxes(torch.where(frozen, weight, lower), torch.where(frozen, weight, upper))


def _extremes(weight: Tensor, quantized: Quantized) -> tuple[Tensor, Tensor]:
    """For each weight, between which values its block's scale (and offset) stay what they are. Weights that are one of
    them set it."""
    format = quantized.format
    blocks = format.blocks(weight)
    least, greatest = quantized.grid.extremes(blocks)
    shape = blocks.shape
    return format.unblock(least.expand(shape), weight.shape), format.unblock(greatest.expand(shape), weight.shape)
