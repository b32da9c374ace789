"""The greatest magnitude of each block, which sets the scale of symmetric formats."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_qguard.formats.format import block_ranges

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def absmax(blocks: Tensor) -> Tensor:
    """Greatest magnitude in each block, ``(n_blocks, 1)`` in the blocks' dtype; NaN where a block holds one.

    Without their sign, floats are ordered like their bits, NaN last; and integers reduce several times as fast.

    Args:
        blocks: ``(n_blocks, block_size)``, floating point.
    """
    bits = blocks.view(_INTEGERS[blocks.element_size()])
    greatest = bits.new_empty(len(blocks), 1)
    for part in block_ranges(blocks):
        torch.amax(bits[part] & torch.iinfo(bits.dtype).max, -1, keepdim=True, out=greatest[part])
    return greatest.view(blocks.dtype)
