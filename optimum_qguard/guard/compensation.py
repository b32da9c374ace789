"""Unbiased rounding with error feedback: the mathematics of ``compensate``, one tensor at a time.

Weights are rounded column by column, each stochastically to one of its two neighbours, after the errors of the columns
before it were taken into account: with ``H = E[x x^T] = (I + U) D (I + U)^T`` (``U`` strictly upper triangular, ``D``
diagonal, ``x`` the layer's input) and ``Q`` the rounded weight, column ``k`` is rounded from

    ``W[:, k] - (Q - W)[:, :k] @ U[:k, k]``

which makes ``E |(Q - W) x|^2 = sum_k D_k E |e_k|^2``, ``e_k`` the rounding errors themselves (LDLQ of Chee et al. 2023,
QuIP, arXiv:2307.13304, equal to GPTQ of Frantar et al. 2023, arXiv:2210.17323). Given the columns before it each error
has mean zero, so by induction ``E[Q] = W``, whatever ``H`` is: who plants a model that generates samples of his choice
chooses how much noise there is and nothing else.

What cannot be represented would be biased: a weight near the alphabet's end, adjusted beyond it, would be pulled back,
always inwards. So the adjustment of a weight is limited, on both sides alike, to its distance from the nearer end:
sums of many independent errors are as often positive as negative, and so the limited ones have mean zero too.

The grid is that of the original weight, and the elements that set it stay as they are, so that the quantizer finds it
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.formats import Format, Grid, block_ranges, check_finite
from optimum_qguard.formats.buckets import bucketize
from optimum_qguard.guard.noise import Draw, check_grid
from optimum_qguard.guard.random import RandomStream

DAMPING = 0.1
_COLUMNS = 64
_SAMPLED_WEIGHTS = 1 << 14


@dataclass(frozen=True)
class Feedback:
    """How the errors of one layer's columns act on the later ones; for all weights that read the same input.

    Attributes:
        order: ``(in_features,)`` int64, the order in which columns are rounded.
        upper: ``(in_features, in_features)`` float32, ``U`` in that order; on and below the diagonal it means nothing.
    """

    order: Tensor
    upper: Tensor


def feedback(second_moment: Tensor, damping: float = DAMPING) -> Feedback:
    """Factorize a second moment.

    Columns of large second moment come first, where all others can make up for their errors.

    Args:
        second_moment: ``(in_features, in_features)``, ``E[x x^T]`` up to a factor, not all zero.
        damping: share of the mean diagonal element that is added to each: what was seen on few samples counts less.

    Raises:
        ValueError: a matrix with NaN or infinite elements, or that is zero.
    """
    diagonal = second_moment.diagonal().double()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        raise ValueError("the second moment of the inputs is zero, infinite or not a number")
    order = diagonal.argsort(descending=True, stable=True)
    # torch factorizes into lower times upper; in reverse order that is upper times lower.
    backwards = order.flip(0)
    matrix = second_moment.double()[backwards][:, backwards]
    matrix.diagonal().add_(damping * mean)
    lower = torch.linalg.cholesky(matrix)
    upper = (lower / lower.diagonal()).float().flip(0, 1)
    return Feedback(order, upper.contiguous())


@torch.no_grad()
def round_compensated(
    weight: Tensor, format: Format, feedback: Feedback, stream: RandomStream, *, name: str = "tensor"
) -> Tensor:
    """Choose the symbols of one tensor.

    Temporary memory is about five tensors of the weight's shape in float32.

    Args:
        weight: ``(out_features, in_features)`` as the quantizer sees it, see `Format`. Not changed.
        format: what the quantizer will do to it; it must keep symbols of the weight's dtype.
        feedback: of the layer's inputs, on the weight's device.
        stream: the tensor's random bits.
        name: what errors call the tensor.

    Returns:
        Symbols (indices into the grid's alphabet, uint8), ``(out_features, in_features)``; `hand_over` makes of them
        what the quantizer gets.

    Raises:
        WeightError: NaN or infinite weights, or too large for what the quantizer computes in.
        ValueError: no fixed grid, or shapes that do not fit.
    """
    if weight.ndim != 2 or len(feedback.order) != weight.shape[1]:
        raise ValueError(f"{name}: {tuple(weight.shape)} weights do not fit {len(feedback.order)} inputs")
    if not format.keeps_symbols(weight.dtype):
        raise ValueError(f"{name}: compensation needs a grid that is known beforehand, which {format} has not")
    quantized = format.quantize(weight, name)
    check_grid(quantized.grid, weight, name)
    blocks, grid, order = format.blocks(weight), quantized.grid, feedback.order

    def columns(per_block: Tensor) -> Tensor:
        """``(n_blocks, 1 or block_size)`` as ``(in_features, out_features)``, in the order of rounding."""
        return format.unblock(per_block.expand(blocks.shape), weight.shape).T[order]

    chosen = _round_columns(
        weight.T[order].float(),
        feedback.upper,
        columns(stream.uniform(0, torch.empty(blocks.shape, device=weight.device))),
        _Columns(grid, columns),
        _Kept(columns(grid.sets_scale(blocks.float()) > 0), columns(quantized.block_codes)),
    )
    return chosen[order.argsort()].T.contiguous()


def hand_over(
    weight: Tensor, format: Format, codes: Tensor, *, dtype: torch.dtype | None = None, name: str = "tensor"
) -> Draw:
    """What the quantizer must get so that it chooses exactly ``codes`` (see `round_compensated`) for ``weight``.

    Args:
        dtype: of the result; the weight's own by default.

    Raises:
        WeightError: NaN or infinite weights, or too large for what the quantizer computes in.
    """
    check_finite(weight, name)
    blocks, chosen = format.blocks(weight), format.blocks(codes.to(weight.device))
    result = torch.empty(blocks.shape, dtype=dtype or weight.dtype, device=weight.device)
    changed = sampled = 0
    if weight.numel():
        grid = format.grid(blocks)
        check_grid(grid, weight, name)
        ranges = list(block_ranges(blocks))
        for index, part in enumerate(ranges):
            values = blocks[part].float()
            result[part] = grid[part].on_grid(chosen[part]).lerp_(values, grid[part].sets_scale(values))
            if index == len(ranges) // 2:
                sample = slice(None, None, values.numel() // _SAMPLED_WEIGHTS | 1)
                before = format.encode(blocks[part][sample], grid[part][sample])
                changed, sampled = int((before != chosen[part][sample]).sum()), before.numel()
    return Draw(format.unblock(result, weight.shape), None, changed / sampled if sampled else 0.0, sampled)


class _Columns:
    """A grid spread over columns. *Units* are those of the alphabet, on the grid that is decoded."""

    def __init__(self, grid: Grid, columns: Callable[[Tensor], Tensor]) -> None:
        scale = grid.scale if grid.decode_scale is None else grid.decode_scale
        offset = grid.offset if grid.decode_offset is None else grid.decode_offset
        self._scale = columns(scale)
        self.inverse = columns(torch.where(scale != 0, 1 / scale, 0))
        self._offset = None if offset is None else columns(offset)
        self._alphabet, self._inner, self._gaps = grid.alphabet, grid.alphabet[1:-1], grid.alphabet.diff()
        self._low, self._high = float(grid.alphabet[grid.first]), float(grid.alphabet[-1])
        self._zero = float(grid.alphabet[0]) if grid.is_uniform else None

    def units(self, part: slice, values: Tensor) -> tuple[Tensor, Tensor]:
        """``values`` of some columns in units, and how far each is from the nearer end of the alphabet."""
        units = (
            values * self.inverse[part] if self._offset is None else (values - self._offset[part]) * self.inverse[part]
        )
        units.clamp_(self._low, self._high)
        return units, torch.minimum(units - self._low, self._high - units)

    def round(self, index: int, units: Tensor, uniform: Tensor, codes: Tensor) -> Tensor:
        """Fill ``codes`` (uint8) with the symbols of a column; return what they decode to. Overwrites its arguments."""
        if self._zero is not None:
            chosen = units.add_(uniform).floor_().clamp_(self._low, self._high)
            codes.copy_(chosen - self._zero if self._zero else chosen)
        else:
            below = bucketize(units, self._inner, right=True)
            above = units.sub_(self._alphabet.index_select(0, below))
            below += above > uniform.mul_(self._gaps.index_select(0, below))
            codes.copy_(below)
            chosen = self._alphabet.index_select(0, below)
        return self.decode(index, chosen)

    def decode(self, part: slice | int, units: Tensor) -> Tensor:
        """Values of ``units`` of some columns."""
        values = units * self._scale[part]
        return values if self._offset is None else values.add_(self._offset[part])


class _Kept:
    """The weights that set a scale, column by column: where they are, and the symbols that they become."""

    def __init__(self, mask: Tensor, codes: Tensor) -> None:
        self._rows, self._codes = mask.nonzero()[:, 1], codes[mask]
        self._ends = [0, *mask.sum(1).cumsum(0).tolist()]

    def restore(self, index: int, codes: Tensor, deviations: Tensor) -> None:
        """Put a column's symbols back. They are no random choice, so there is no error to feed on."""
        part = slice(self._ends[index], self._ends[index + 1])
        if part.start < part.stop:
            codes.index_copy_(0, self._rows[part], self._codes[part])
            deviations.index_fill_(0, self._rows[part], 0)


def _round_columns(work: Tensor, upper: Tensor, uniform: Tensor, grid: _Columns, kept: _Kept) -> Tensor:
    """Symbols, uint8, of ``work`` ``(in_features, out_features)``, which is overwritten: rows that are done hold the
    deviation of what is decoded from the weight (from the last symbol, for a weight beyond it)."""
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, len(work), _COLUMNS):
        part = slice(start, min(start + _COLUMNS, len(work)))
        shifts = torch.mm(upper[:start, part].T, work[:start])
        units, room = grid.units(part, work[part])
        targets = grid.decode(part, units)
        for index in range(part.start, part.stop):
            column = index - start
            shift = shifts[column].addmv_(work[start:index].T, upper[start:index, index]).mul_(grid.inverse[index])
            shift = torch.clamp(shift, -room[column], room[column])
            decoded = grid.round(index, units[column].sub_(shift), uniform[index], codes[index])
            torch.sub(decoded, targets[column], out=work[index])
            kept.restore(index, codes[index], work[index])
    return codes
