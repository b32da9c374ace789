"""Weights that stand alone: larger by far than the rest of their block and than the rest of their column.

What guard takes out and scan reports. Both gaps are needed: a heavy tail is large but not isolated in its block, and a
column that is large in every row is a channel that the model uses, not a weight that somebody put there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 8.0
"""The gap from which on a weight stands alone."""

BLOCK_LENGTHS = (256, 128, 64, 32, 16)
"""Blocks of consecutive weights that are worth a look, besides whole rows."""

_MOST_IN_BLOCK = 4
_COLUMN_ROWS = 256


@dataclass(frozen=True)
class Isolated:
    """The largest weights of ``n`` blocks that have a gap among them; ``k`` is `most_in_block`.

    Attributes:
        index: ``(n, k)``, where the largest weights are in the flat tensor, the largest first.
        magnitude: ``(n, k)``, theirs.
        rest: ``(n, 1)``, the largest magnitude below the block's gap.
        column_gap: ``(n, k)``, the weight in units of its column's typical one, over the largest of the rest likewise.
        outlier: ``(n, k)`` bool, which of them stand alone; perhaps none of a block.
    """

    index: Tensor
    magnitude: Tensor
    rest: Tensor
    column_gap: Tensor
    outlier: Tensor

    def gaps(self) -> tuple[Tensor, Tensor]:
        """Of each block that has a weight which stands alone, the least gap to the block and the least to columns."""
        hit = self.outlier.any(1)
        in_block, in_column = (
            each.masked_fill(~self.outlier, torch.inf).amin(1)[hit]
            for each in (self.magnitude / self.rest, self.column_gap)
        )
        return in_block, in_column


def most_in_block(length: int) -> int:
    """How many weights of a block may stand alone together."""
    return max(1, min(_MOST_IN_BLOCK, length // 8))


def has_gap(blocks: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """``(n_blocks,)`` bool: whether `find_isolated` would look at a block more closely."""
    if len(blocks) == 0:
        return torch.zeros(0, dtype=torch.bool, device=blocks.device)
    return _above_gap(blocks.float().abs().topk(most_in_block(blocks.shape[1]) + 1, dim=1).values, threshold).any(1)


def _above_gap(top: Tensor, threshold: float) -> Tensor:
    return (top[:, :-1] > threshold * top[:, 1:]) & (top[:, 1:] > 0)


def find_isolated(
    blocks: Tensor, starts: Tensor, typical: Callable[[], Tensor], threshold: float = THRESHOLD
) -> Isolated | None:
    """Look for weights that stand alone; ``None`` if no block has a gap.

    Args:
        blocks: ``(n_blocks, length)``, of any float dtype.
        starts: ``(n_blocks,)``, where each begins in the flat tensor.
        typical: of the tensor's columns, see `typical_of_columns`; asked for only if a block has a gap.
        threshold: the least gap to the block; to the column a quarter of it is enough.
    """
    length, most = blocks.shape[1], most_in_block(blocks.shape[1])
    magnitude = blocks.float().abs()
    top, position = magnitude.topk(most + 1, dim=1)
    above_gap = _above_gap(top, threshold)
    chosen = above_gap.any(1).nonzero().flatten()
    if len(chosen) == 0:
        return None
    # In a block of few weights that are not zero any gap is an accident.
    chosen = chosen[(magnitude[chosen] > 0).sum(1) > length // 4 + most]
    if len(chosen) == 0:
        return None
    top, position, magnitude = top[chosen], position[chosen], magnitude[chosen]
    order = torch.arange(most, device=blocks.device)
    many = ((order + 1) * above_gap[chosen]).amax(1, keepdim=True)
    start = starts[chosen][:, None]
    columns = typical()
    units = magnitude / columns[(start + torch.arange(length, device=blocks.device)) % len(columns)]
    above = units.gather(1, position[:, :-1])
    outlier = order < many
    units.scatter_(1, position[:, :-1], above.masked_fill(outlier, 0))
    column_gap = above / units.amax(1, keepdim=True)
    outlier &= column_gap > threshold / 4
    return Isolated(start + position[:, :-1], top[:, :-1], top.gather(1, many), column_gap, outlier)


def typical_of_columns(weight: Tensor) -> Tensor:
    """``(in_features,)`` float32: the lower quartile of each column's weights that are not zero, over at most about
    `_COLUMN_ROWS` rows."""
    rows = weight[:: max(1, weight.shape[0] // _COLUMN_ROWS)].float().abs()
    ordered = rows.T.contiguous().sort(dim=1).values
    zeros = (ordered == 0).sum(1, keepdim=True)
    quartile = ordered.gather(1, (zeros + (len(rows) - zeros) // 4).clamp(max=len(rows) - 1)).flatten()
    return torch.where(quartile > 0, quartile, quartile.max())
