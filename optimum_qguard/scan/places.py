"""Places of weights in the cells that quantizers would put them in: how far from the symbol, and on which side.

On evenly spaced grids they are the last bits of a product; in code books they are looked up; the scales of K-quants
have to be searched first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from optimum_qguard.formats import get_format
from optimum_qguard.formats.scratch import Scratch
from optimum_qguard.scan.cells import CELLS, FINE

BINS = 128
"""Of a histogram, over positions 0 to 1."""

_COARSE_REACH = 8.0  # steps
_SHORTEST = 32  # block
SEARCHED = 256  # block of the K-quants
_K_QUANT_WEIGHTS = 1 << 13
_MAGIC = 1.5 * 2**23  # a float32 of this size has its integer in its last bits
_LEAST_SPREAD = 0.65  # mean over a block of min(1, magnitude in steps); normal weights with σ of one step have 0.63
_CODE_BOOK_STEP = 0.15  # what counts as a step there, as a share of absmax
_LEAST_SIDE = 0.02  # of a code book's cell, as a share of absmax


@dataclass(frozen=True)
class Plan:
    """How matrices of one width are looked at: indices into `CELLS`.

    Attributes:
        even: those with evenly spaced grids; ``symmetric`` of them, which come first, have a symbol at zero.
        books: those with a code book.
        searched: those whose scale is searched.
        blocks: lengths of the blocks of ``even``, each once.
        block, width: for each of ``even`` the index in ``blocks``, and what sets its scale (as `_even_grids` has it).
        steps, shifted, reach: ``(n_even, 1)`` float32: see `Cells`, and how many steps from zero coarse weights are
            looked at.
    """

    even: tuple[int, ...]
    symmetric: int
    books: tuple[int, ...]
    searched: tuple[int, ...]
    blocks: tuple[int, ...]
    block: Tensor
    width: Tensor
    steps: Tensor
    shifted: Tensor
    reach: Tensor

    @property
    def looked(self) -> tuple[int, ...]:
        """In the order of `find_places`."""
        return self.even + self.books


@cache
def plan_for(columns: int) -> Plan | None:
    """``None`` if no format fits."""
    fitting = [index for index, cells in enumerate(CELLS) if cells.fits(columns)]
    if not fitting:
        return None
    even = sorted((index for index in fitting if CELLS[index].steps), key=lambda index: CELLS[index].shifted)
    cells_of = [CELLS[index] for index in even]
    blocks = sorted({cells.block for cells in cells_of})
    return Plan(
        tuple(even),
        sum(not cells.shifted for cells in cells_of),
        tuple(index for index in fitting if CELLS[index].flat),
        tuple(index for index in fitting if CELLS[index].block == SEARCHED),
        tuple(blocks),
        torch.tensor([blocks.index(cells.block) for cells in cells_of], dtype=torch.int64),
        torch.tensor([3 if c.ranged else 4 if c.format == "int8-rowwise" else 2 for c in cells_of], dtype=torch.int64),
        torch.tensor([[cells.steps] for cells in cells_of]).view(-1, 1),
        torch.tensor([[float(cells.shifted)] for cells in cells_of]).view(-1, 1),
        torch.tensor([[_COARSE_REACH + 1 if cells.steps >= FINE else torch.inf] for cells in cells_of]).view(-1, 1),
    )


def find_places(rows: Tensor, spread: Tensor, plan: Plan, scratch: Scratch, *, coarse: bool) -> Tensor:
    """The weights' places in their cells, ``(n_formats, n)`` int32 from 0 to 255 (0 to 127 to the symbol's right, 255
    down to 128 to its left)."""
    columns, n = rows.shape[1], spread.numel()
    flat = spread.reshape(-1)
    places = scratch.like(flat.expand(len(plan.looked), n), "places")
    if plan.even:
        # The longest run of weights that none of the formats cuts.
        run = _SHORTEST if columns % _SHORTEST == 0 else columns
        units = places[: len(plan.even)].view(len(plan.even), -1, run)
        _place(spread.view(-1, run), *_even_grids(rows, run, plan, coarse=coarse), units, plan.symmetric, scratch)
    if plan.books:
        _place_in_code_books(rows.reshape(-1), flat, plan, places.view(torch.int32)[len(plan.even) :], scratch)
    return places.view(torch.int32)


def _even_grids(rows: Tensor, run: int, plan: Plan, *, coarse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps to a unit, offset, and least and greatest weight, each ``(n_formats, n_runs, 1)``."""
    low, high = rows.view(-1, run).amin(1).float(), rows.view(-1, run).amax(1).float()
    by_block = []
    for block in plan.blocks:
        in_block = (block or rows.shape[1]) // run
        least, greatest = low.view(-1, in_block).amin(1), high.view(-1, in_block).amax(1)
        absmax = torch.maximum(-least, greatest)
        half = absmax.half().float()  # as bitsandbytes stores it
        of_block = torch.stack([least, greatest, absmax, greatest - least, half])
        by_block.append(of_block.unsqueeze(2).expand(-1, -1, in_block).reshape(len(of_block), -1))
    known = torch.stack(by_block)
    least, greatest = known[plan.block, 0], known[plan.block, 1]
    inverse = plan.steps / known[plan.block, plan.width]
    offset = least * plan.shifted
    if coarse:
        # In the weights' units: no limit becomes the block's extreme value.
        limit = (plan.reach / inverse).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        least, greatest = torch.maximum(least, -limit), torch.minimum(greatest, limit)
    return inverse.unsqueeze(2), offset.unsqueeze(2), least.unsqueeze(2), greatest.unsqueeze(2)


def _spread_enough(blocks: Tensor, inverse: Tensor, units: Tensor, scratch: Scratch) -> Tensor:
    """``inverse`` steps ``(n_formats, n_blocks, 1)``, 0 where a block's weights are mostly within a step of zero;
    overwrites ``units``."""
    magnitude = torch.abs(blocks, out=scratch.like(blocks, "magnitude"))
    saturated = torch.mul(magnitude, inverse, out=units).clamp_(max=1).mean(-1, keepdim=True)
    return torch.where((saturated > _LEAST_SPREAD) & inverse.isfinite(), inverse, 0)


def _place(
    blocks: Tensor,
    inverse: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    units: Tensor,
    symmetric: int,
    scratch: Scratch,
) -> None:
    """Places on grids of given ``inverse`` steps and ``offset``, ``(n_formats, n_blocks, 1)``; of the first
    ``symmetric`` formats zero is a symbol. The bits of ``units``, float32, become the places."""
    bins = 2.0 * BINS
    inverse = _spread_enough(blocks, inverse, units, scratch)
    # A whole number of steps, so that what is clamped comes to lie on a symbol.
    least = ((low - offset) * inverse).ceil_().add_(1).mul_(bins).sub_(0.5)
    greatest = ((high - offset) * inverse).floor_().sub_(1).mul_(bins).sub_(0.5)
    inverse = inverse * bins
    # Not addcmul: it takes three times as long.
    torch.mul(blocks, inverse, out=units).sub_(offset * inverse + 0.5)
    # Not clamp: with bounds that are tensors it takes several times as long.
    torch.minimum(torch.maximum(units, least, out=units), greatest, out=units)
    # Zero's cell is left out, since weights may be small for reasons of their own. Half a bin was subtracted already.
    torch.ops.aten.hardshrink.out(units[:symmetric], BINS - 0.5, out=units[:symmetric])
    # The addition rounds to a whole number, half to even: what is clamped goes to bin 0.
    units.add_(_MAGIC).view(torch.int32).bitwise_and_(2 * BINS - 1)


def find_places_in_k_quant(stored: Tensor, weights: Tensor, index: int) -> Tensor:
    """`find_places` for a K-quant, whose scales only its own search knows."""
    count = min(_K_QUANT_WEIGHTS, stored.numel()) // SEARCHED * SEARCHED
    stored, blocks = (part[:count].view(-1, SEARCHED) for part in (stored, weights))
    format = get_format(CELLS[index].format)
    sub_blocks = format.blocks(stored)
    grid = format.grid(sub_blocks)
    weights = blocks.reshape(sub_blocks.shape)
    offset = torch.zeros_like(grid.scale) if grid.offset is None else grid.offset
    ends = torch.stack([grid.alphabet[0] * grid.scale, grid.alphabet[-1] * grid.scale]) + offset
    low, high = ends.amin(0), ends.amax(0)
    # Scales that do not fit in float16 are infinite, or not even numbers.
    low = torch.maximum(low.nan_to_num_(0), weights.amin(1, keepdim=True))
    high = torch.minimum(high.nan_to_num_(0), weights.amax(1, keepdim=True))
    offset = offset.nan_to_num(0)
    units = torch.empty(1, *weights.shape)
    symmetric = int(grid.offset is None)
    _place(weights, 1 / grid.scale.abs()[None], offset[None], low, high, units, symmetric, Scratch())
    return units.view(torch.int32).view(1, -1)


def _place_in_code_books(stored: Tensor, flat: Tensor, plan: Plan, places: Tensor, scratch: Scratch) -> None:
    """`find_places` between the symbols of code books; what is left over at the end is left out."""
    width = CELLS[plan.books[0]].block
    whole = flat.numel() // width * width
    places[:, whole:] = 0
    if whole == 0:
        return
    blocks = flat[:whole].view(-1, width)
    absmax = stored[:whole].view(-1, width).abs().amax(1, keepdim=True).float()
    units = scratch.like(blocks, "units")
    inverse = _spread_enough(blocks, 1 / (_CODE_BOOK_STEP * absmax)[None], units[None], scratch)[0]
    torch.mul(blocks, inverse * (_CODE_BOOK_STEP * 32767), out=units)
    index = units.clamp_(-32767, 32767).add_(_MAGIC).view(torch.int32).bitwise_and_(0xFFFF).view(-1)
    for line, book in enumerate(plan.books):
        torch.index_select(_code_book(CELLS[book].format), 0, index, out=places[line, :whole])


@cache
def _code_book(format: str) -> Tensor:
    """Places for each of 2¹⁶ numbers from -1 to 1, negative ones after the positive ones. 0 in an end symbol's cell,
    and on sides too narrow to be told apart."""
    grid = get_format(format).grid(torch.ones(1, 64))
    numbers = np.arange(1 << 16)
    units = np.where(numbers < 1 << 15, numbers, numbers - (1 << 16)) / 32767
    alphabet, edges = grid.alphabet.double().numpy(), grid.edges.double().numpy()
    symbol = np.searchsorted(edges[1:-1], units)
    right = units >= alphabet[symbol]
    side = np.where(right, edges[symbol + 1] - alphabet[symbol], alphabet[symbol] - edges[symbol])
    inner = (symbol > 0) & (symbol < len(alphabet) - 1) & (alphabet[symbol] != 0) & (side > _LEAST_SIDE)
    place = np.minimum(np.abs(units - alphabet[symbol]) / np.maximum(side, 1e-9) * BINS, BINS - 1).astype(np.int32)
    return torch.from_numpy(np.where(inner, np.where(right, place, 2 * BINS - 1 - place), 0).astype(np.int32))
