"""16-bit weights stand for all the numbers that round to them: spread them over those, so that grids do not meet."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from optimum_qguard.formats.scratch import Scratch

CHUNK = 1 << 16
"""Weights that are looked at in one go."""


def dithered(rows: Tensor, scratch: Scratch) -> tuple[Tensor, bool]:
    """The weights in float32, each moved to a random one of the numbers that round to it; and whether they were BF16.

    Also where a 16-bit model was stored in 32 bits: a float32 whose last 16 bits are all zero is taken for a BF16, one
    whose last 13 bits are for an FP16. Of others, one in thousands is moved by 2⁻¹¹ of itself, which changes nothing.
    """
    weights = scratch.like(rows, "dithered").copy_(rows)
    bits = weights.view(torch.int32)
    coarse = rows.dtype == torch.bfloat16
    if coarse:
        bits += _noise(bits.numel(), 16).view_as(bits)
    elif rows.dtype == torch.float16:
        bits += _noise(bits.numel(), 13).view_as(bits)
    else:
        last = bits & 0x1FFF
        if _is_often_zero(last):
            is_16 = last == 0
            is_bfloat16 = is_16 & ((bits & 0xFFFF) == 0)
            noise = torch.where(is_16, _noise(bits.numel(), 13).view_as(bits), 0)
            # Many FP16 numbers are BF16 numbers too: only where most are, it is a BF16 model.
            coarse = int(is_bfloat16.sum()) > 0.5 * int(is_16.sum())
            bits += torch.where(is_bfloat16, _noise(bits.numel(), 16).view_as(bits), noise) if coarse else noise
    return torch.where(rows == 0, 0, weights), coarse


def is_rounded(rows: Tensor) -> bool:
    """Whether `dithered` would find that these had 16 bits."""
    if rows.dtype in (torch.bfloat16, torch.float16):
        return True
    return _is_often_zero(rows.reshape(-1)[:CHUNK].float().view(torch.int32) & 0x1FFF)


def _is_often_zero(bits: Tensor) -> bool:
    return int(torch.count_nonzero(bits)) < 0.999 * bits.numel()


@cache
def _all_noise(bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(1 << bits) // 2, (1 << bits) // 2, (2 * CHUNK,), dtype=torch.int32, generator=generator)


def _noise(count: int, bits: int) -> Tensor:
    noise = _all_noise(bits)
    return noise[:count] if count <= len(noise) else noise.repeat(-(-count // len(noise)))[:count]
