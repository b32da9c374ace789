"""The one description of a quantization grid that guard, scan and the attacks share.

A quantizer lays a grid over each *scaling block* of a tensor: the value of symbol ``c`` in block ``b`` is
``scale[b] * alphabet[c] + offset[b]``. All weights that it maps to one symbol form that symbol's *cell*; the cell's
boundaries, in units of the alphabet, are ``edges[c]`` and ``edges[c + 1]``. Everything that can be said about cells
(values, bounds, half-widths, unbiased rounding) follows from these few tensors and is said here, once.

Source: Egashira et al. 2024 (arXiv:2405.18137) for cells; the half-width and its median are equations (1) to (3) of
"Interval-Calibrated Noisy Quantization".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The grid over ``n_blocks`` scaling blocks.

    Attributes:
        alphabet: ``(n_symbols,)`` float32, strictly ascending.
        edges: ``(n_symbols + 1,)`` float32, ascending: symbol ``c`` owns ``[edges[c], edges[c + 1]]``. The outer two
            are where the quantizer's range ends: the end symbol itself, or further out where it clamps.
        scale: ``(n_blocks, 1)`` float32, the scale the quantizer divides by when it chooses symbols.
        offset: ``(n_blocks, 1)`` float32 or ``None`` for symmetric formats.
        decode_scale: ``(n_blocks, 1)`` float32, where the quantizer stores its scale rounded (fp16 scales, double
            quantization), so that decoding uses another one than encoding; ``None`` where they are the same.
        decode_offset: likewise for the offset.
        first: index of the least symbol that unbiased rounding may choose. Where a block's extreme value lies half a
            step short of the last symbol (symmetric grids of an even number of integers), a weight on that symbol would
            be the new extreme and change the scale.
    """

    alphabet: Tensor
    edges: Tensor
    scale: Tensor
    offset: Tensor | None = None
    decode_scale: Tensor | None = None
    decode_offset: Tensor | None = None
    first: int = 0

    def __getitem__(self, blocks: slice) -> Grid:
        """The grid of a range of blocks (views, no copies)."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[blocks]

        return replace(
            self,
            scale=self.scale[blocks],
            offset=part(self.offset),
            decode_scale=part(self.decode_scale),
            decode_offset=part(self.decode_offset),
        )

    @cached_property
    def is_uniform(self) -> bool:
        """Whether neighbouring symbols are everywhere one unit apart (integer grids)."""
        return bool((self.alphabet.diff() == 1).all())

    def decode(self, codes: Tensor) -> Tensor:
        """Dequantized values, float32, of ``codes`` ``(n_blocks, block_size)``."""
        scale = self.scale if self.decode_scale is None else self.decode_scale
        offset = self.offset if self.decode_offset is None else self.decode_offset
        return _affine(self.alphabet[codes.long()], scale, offset)

    def bounds(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end of each weight's cell, float32, shaped like ``codes``."""
        index = codes.long()
        lower = _affine(self.edges[index], self.scale, self.offset)
        upper = _affine(self.edges[index + 1], self.scale, self.offset)
        return torch.minimum(lower, upper), torch.maximum(lower, upper)

    def half_widths(self, codes: Tensor) -> Tensor:
        """Half the width of each weight's cell, float32, broadcastable to ``codes``.

        On a uniform grid this is half a step for every symbol, end symbols included: ``(n_blocks, 1)``.
        """
        if self.is_uniform:
            return self.scale.abs() / 2
        return (self.edges.diff() / 2)[codes.long()] * self.scale.abs()

    def median_half_width(self, codes: Tensor | None, block_sizes: Tensor | int) -> Tensor:
        """Median over all weights of the half-width, a float32 scalar, from block statistics only.

        Args:
            codes: ``(n_blocks, block_size)``; not read (and may be ``None``) on a uniform grid.
            block_sizes: how many weights each block really has, ``(n_blocks,)``, or one number for all.

        Half-widths take few distinct values per block (one on a uniform grid, one per kind of cell otherwise), so the
        median is a weighted median over ``n_blocks`` times that number of values; no sort of all weights.
        """
        n_blocks = self.scale.shape[0]
        sizes = torch.as_tensor(block_sizes, device=self.scale.device).expand(n_blocks)
        if self.is_uniform:
            return weighted_median(self.scale.abs().flatten() / 2, sizes)
        if codes is None:
            raise ValueError("the median half-width of a non-uniform grid needs the codes")
        kinds, kind_of_symbol = torch.unique(self.edges.diff() / 2, return_inverse=True)
        counts = torch.zeros(n_blocks, len(kinds), dtype=torch.long, device=codes.device)
        ragged = sizes.min() < codes.shape[1]
        for start in range(0, n_blocks, _CHUNK_BLOCKS):
            part = slice(start, start + _CHUNK_BLOCKS)
            kind = kind_of_symbol[codes[part].long()]
            ones = torch.ones_like(kind)
            if ragged:
                ones *= torch.arange(codes.shape[1], device=codes.device) < sizes[part, None]
            counts[part].scatter_add_(1, kind, ones)
        return weighted_median((self.scale.abs() * kinds).flatten(), counts.flatten())

    def neighbour_below(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """For ``values`` ``(n_blocks, block_size)`` the symbol at or below, and how far on to the next one (0 to 1).

        Measured on the grid that is decoded. Values outside the alphabet's range sit at its end: nothing beyond the
        end can be represented, so no rounding of them is unbiased.
        """
        scale = self.scale if self.decode_scale is None else self.decode_scale
        offset = self.offset if self.decode_offset is None else self.decode_offset
        units = values if offset is None else values - offset
        units = torch.where(scale != 0, units / scale, 0.0)
        last = len(self.alphabet) - 1
        units = units.clamp(self.alphabet[self.first], self.alphabet[last])
        if self.is_uniform:
            units -= self.alphabet[0]
            below = units.floor().clamp_(max=last - 1)
            return below.long(), units - below
        below = torch.bucketize(units, self.alphabet[1:-1], right=True)
        low = self.alphabet[below]
        return below, (units - low) / (self.alphabet[below + 1] - low)

    def on_grid(self, codes: Tensor) -> Tensor:
        """Values that the quantizer, given the same scales, encodes to exactly ``codes``; float32."""
        return _affine(self.alphabet[codes.long()], self.scale, self.offset)


_CHUNK_BLOCKS = 1 << 14


def _affine(units: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    values = units * scale
    return values if offset is None else values + offset


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Lower weighted median of ``values`` ``(n,)`` with integer ``weights`` ``(n,)``: the value that ``torch.median``
    gives after repeating each value as often as its weight says. Zero total weight gives 0."""
    total = int(weights.sum())
    if total == 0:
        return values.new_zeros(())
    ordered, order = values.sort()
    reached = weights[order].cumsum(0) >= (total + 1) // 2
    return ordered[int(reached.int().argmax())]


def midpoint_edges(alphabet: Tensor) -> Tensor:
    """Edges of round-to-nearest cells over an ascending ``alphabet``; the outer two are the end symbols."""
    return torch.cat([alphabet[:1], (alphabet[:-1] + alphabet[1:]) / 2, alphabet[-1:]])
