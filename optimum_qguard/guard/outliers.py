"""The clip arm: find block maxima that were planted, and bring them back to what the rest of their block supports.

One weight in a block that is made 512 times larger makes the block's grid 512 times coarser, so all its other weights
round to zero. Randomizing inside such cells does not help; the outlier must go before the grid is laid.

A weight counts as planted only if all of this holds:

- It is *isolated in its block*: beyond a gap of ``threshold`` between neighbouring order statistics, with at most four
  weights above the gap. Heavy tails are large but not isolated: for a tail ``P(|w| > x) ~ x**-a`` the gap below the
  largest exceeds ``g`` in a share ``g**-a`` of the blocks, 0.2 % for Student's t with three degrees of freedom.
- It is *isolated from its column*: in units of each column's typical weight, the lower quartile over the rows, there is
  a gap as well, a quarter as wide. A column that is large in every row is a channel that the model uses (or that a norm
  before it balances), and is left alone.
- There are *more of its kind* than heavy tails would have: for some ``g``, more than three blocks and ``4 g**-2.5`` of
  all blocks have both gaps beyond ``g``. Genuine single weights ("super weights") are few, and their gaps narrow.

Blocks of whole rows, of the format's length and of 16 to 256 consecutive weights are looked at, whatever format the
attacker had in mind. What the rest of a block supports: where the outliers of a tensor share a factor it shows, because
the ratio of a block's largest weight to the next one crowds just above 1 and is never below. They are divided by that
factor, exactly if it is a power of two; and the block length at which ratios crowd most is the attacker's. Where no
factor is common, an outlier becomes as large as the largest of the rest. Its sign stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from optimum_qguard.formats import Format, Scratch, block_ranges
from optimum_qguard.formats.outliers import BLOCK_LENGTHS, THRESHOLD, Isolated, find_isolated, typical_of_columns

_FEW_BLOCKS = 3
_SAMPLED_WEIGHTS = 1 << 18
_TAIL, _TAIL_SHARE = 2.5, 4.0
_NATURAL_RATIO = 4.0  # largest to next in a clean block: above it in 1 of 5,000 (SmolLM2)
_LARGEST_RATIO = 32.0
_LARGEST_IN_COLUMN = 16.0  # of normal weights, five standard deviations
_RARE = 0.005
_CROWDED = 1.25
_EXACT = 0.02


def clip_outliers(
    weight: Tensor, format: Format, threshold: float = THRESHOLD, scratch: Scratch | None = None
) -> tuple[Tensor, int]:
    """The weight without planted outliers, and how many there were; the very same tensor if there were none.

    Args:
        weight: as the quantizer sees it, see `Format`. Not changed.
        format: what the quantizer will do to it.
        threshold: how many times larger than all others in its block an outlier is.
        scratch: buffers to use; give the same for each tensor of a model.
    """
    if weight.numel() == 0 or weight.ndim < 2:
        return weight, 0
    scratch = scratch or Scratch()
    length = min(format.blocks(weight).shape[1], weight.shape[-1])
    if not _is_suspicious(_pieces(weight, length), scratch):
        return weight, 0
    matrices = weight.reshape(-1, *weight.shape[-2:])
    clipped = torch.stack([_clip_matrix(matrix, length, threshold, scratch) for matrix in matrices]).view_as(weight)
    count = int((clipped != weight).sum())
    return (clipped, count) if count else (weight, 0)


def _pieces(weight: Tensor, length: int) -> Tensor:
    """``(n, length)`` consecutive weights, a view where they divide evenly; else padded with zeros."""
    flat = weight.reshape(-1)
    missing = -len(flat) % length
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, length)


def _is_suspicious(blocks: Tensor, scratch: Scratch) -> bool:
    """Whether blocks have maxima far above their mean: two reductions, which spare clean tensors everything else."""
    length = blocks.shape[1]
    ratio = 16.0 if length >= 256 else 10.0 if length >= 64 else 6.0
    found = torch.empty(len(blocks), device=blocks.device)
    for part in block_ranges(blocks):
        magnitude = scratch.like(blocks[part], "magnitude").copy_(blocks[part]).abs_()
        torch.div(magnitude.amax(1), magnitude.mean(1), out=found[part])
    far, farther = int((found > ratio).sum()), int((found > 2.5 * ratio).sum())
    return far > _FEW_BLOCKS + _RARE * len(blocks) or farther > _FEW_BLOCKS


def _clip_matrix(weight: Tensor, length: int, threshold: float, scratch: Scratch) -> Tensor:
    typical = typical_of_columns(weight)
    lengths = [size for size in dict.fromkeys((weight.shape[-1], length, *BLOCK_LENGTHS)) if size <= weight.shape[-1]]
    sample = weight[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)]
    for _ in lengths:
        # Where outliers are all over the tensor a part of it shows the attacker's block length.
        best = _best_length(sample, lengths, typical, threshold, scratch)
        best = best or _best_length(weight, lengths, typical, threshold, scratch)
        outliers = _find(weight, best, typical, threshold) if best else None
        if outliers is None:
            break
        restored = outliers.restored().to(weight.dtype)
        weight = weight.reshape(-1).scatter(0, outliers.index, restored).view(weight.shape)
        sample = weight[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)]
    return weight


def _best_length(weight: Tensor, lengths: list[int], typical: Tensor, threshold: float, scratch: Scratch) -> int | None:
    """The block length that the attacker had in mind; ``None`` if no length shows planted outliers."""
    suspicious = [size for size in lengths if _is_suspicious(_pieces(weight, size), scratch)]
    found = {size: outliers for size in suspicious if (outliers := _find(weight, size, typical, threshold)) is not None}
    return min(found, key=lambda size: found[size].rank, default=None)


@dataclass(frozen=True)
class _Outliers:
    """Planted weights of one tensor, ``(n,)`` each: flat indices, values, the largest of the rest of their block, and
    what is typical of their column. For each block the ratio of its least outlier to the rest, sorted; and of how many
    blocks."""

    index: Tensor
    value: Tensor
    rest: Tensor
    typical: Tensor
    ratios: Tensor
    n_blocks: int

    @cached_property
    def rank(self) -> tuple[float, int]:
        """Least for the block length that the attacker had in mind: where the ratios crowd most; where they do not
        crowd anywhere, that with the most outliers."""
        crowding = _edge(self.ratios)[1]
        return (crowding if crowding <= _CROWDED else _CROWDED, -len(self.index))

    def restored(self) -> Tensor:
        ratio = self.value.abs() / self.rest
        factor = torch.ones_like(ratio)
        for common in sorted(_common_factors(self.ratios, self.n_blocks)):
            factor = torch.where(ratio > common / (1 + _EXACT), common, factor)
        natural = ratio / factor
        usual = (natural < _NATURAL_RATIO) | (self.value.abs() < _LARGEST_IN_COLUMN * factor * self.typical)
        supported = (factor > 1) & (usual | (natural < _LARGEST_RATIO))
        if int((supported & ~usual).sum()) > _FEW_BLOCKS + _RARE * self.n_blocks:
            supported &= usual
        return torch.where(supported, self.value / factor, self.rest.copysign(self.value))


def _find(weight: Tensor, length: int, typical: Tensor, threshold: float) -> _Outliers | None:
    blocks = _pieces(weight, length)
    starts = torch.arange(len(blocks), device=weight.device) * length
    found = [find_isolated(blocks[part], starts[part], lambda: typical, threshold) for part in block_ranges(blocks)]
    parts = [part for part in found if part is not None]
    if not parts:
        return None
    isolated = Isolated(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Isolated)))
    ratios, column_gaps = isolated.gaps()
    if not _are_many(torch.minimum(ratios, column_gaps), len(blocks)):
        return None
    index = isolated.index[isolated.outlier]
    value = weight.reshape(-1)[index].float()
    rest = isolated.rest.expand_as(isolated.outlier)[isolated.outlier]
    return _Outliers(index, value, rest, typical[index % weight.shape[-1]], ratios.sort().values, len(blocks))


def _are_many(gaps: Tensor, n_blocks: int) -> bool:
    """Whether the gaps are more than a tail ``x**-2.5`` would have, whichever gap one begins to count at."""
    beyond = torch.arange(len(gaps), 0, -1, device=gaps.device)
    return bool((beyond > _FEW_BLOCKS + _TAIL_SHARE * n_blocks * gaps.sort().values ** -_TAIL).any())


def _edge(ratios: Tensor) -> tuple[float, float]:
    """The factor that ratios (sorted) crowd just above, found where a quarter of them is closest together, and how much
    larger than the factor the lower quarter of those about it is."""
    quarter = max(2, len(ratios) // 4)
    widths = ratios[quarter - 1 :] / ratios[: len(ratios) - quarter + 1]
    low = ratios[widths.argmin()]
    about = ratios[(ratios > low / 2) & (ratios < low * _NATURAL_RATIO)]
    factor = float(about[len(about) // 100])
    return factor, float(about[len(about) // 4]) / factor


def _common_factors(ratios: Tensor, n_blocks: int) -> list[float]:
    """The factors that many of the ratios (sorted) crowd just above, found one after another."""
    factors: list[float] = []
    while len(ratios) > _FEW_BLOCKS + _RARE * n_blocks * bool(factors):
        factor, width = _edge(ratios)
        if width > _CROWDED:
            break
        power = 2.0 ** round(math.log2(factor))
        factors.append(power if abs(factor / power - 1) < _EXACT else factor)
        ratios = ratios[(ratios < factors[-1] / (1 + _EXACT)) | (ratios >= factors[-1] * _NATURAL_RATIO)]
    return factors
