"""The one description of a quantization grid that guard, scan and the attacks share.

A quantizer lays a grid over each *scaling block* of a tensor: the value of symbol ``c`` in block ``b`` is
``scale[b] * alphabet[c] + offset[b]``. All weights that it maps to one symbol form that symbol's *cell*; the cell's
boundaries, in units of the alphabet, are ``edges[c]`` and ``edges[c + 1]``. Everything that can be said about cells
(values, bounds, half-widths, unbiased rounding) follows from these few tensors and is said here, once.

Source: Egashira et al. 2024 (arXiv:2405.18137) for cells; the half-width and its median are equations (1) to (3) of
"Interval-Calibrated Noisy Quantization".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from optimum_qguard.formats.buckets import bucketize, neighbours
from optimum_qguard.formats.scratch import CHUNK_WEIGHTS, Scratch

_NO_LESS = 1 + 2**-22


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
        keeps_extremes: whether a block's extreme value is, to the last bit, the value of an end symbol, so that
            unbiased rounding leaves it where it is and the quantizer finds the same scale again.
    """

    alphabet: Tensor
    edges: Tensor
    scale: Tensor
    offset: Tensor | None = None
    decode_scale: Tensor | None = None
    decode_offset: Tensor | None = None
    first: int = 0
    keeps_extremes: bool = False

    def __getitem__(self, blocks: slice) -> Grid:
        """The grid of a range of blocks (views, no copies)."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[blocks]

        piece = replace(
            self,
            scale=self.scale[blocks],
            offset=part(self.offset),
            decode_scale=part(self.decode_scale),
            decode_offset=part(self.decode_offset),
        )
        vars(piece).update(is_uniform=self.is_uniform, ends=self.ends)  # not worked out again for each piece
        return piece

    @cached_property
    def is_uniform(self) -> bool:
        """Whether neighbouring symbols are everywhere one unit apart (integer grids)."""
        return bool((self.alphabet.diff() == 1).all())

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Least and greatest symbol that unbiased rounding may choose."""
        return float(self.alphabet[self.first]), float(self.alphabet[-1])

    @property
    def inverse(self) -> Tensor:
        """What unbiased rounding multiplies values by, ``(n_blocks, 1)``: 1 / scale, or 0 for a block of zeros (or of
        numbers so small that 1 / scale overflows)."""
        inverse = 1 / (self.scale if self.decode_scale is None else self.decode_scale)
        if self.keeps_extremes and self.is_uniform:
            # Else the product of an extreme value may be a bit less than the end symbol, whose other neighbour would
            # be drawn once in 2**16 times. What is beyond the end is clamped to it.
            inverse = inverse * _NO_LESS
        return torch.where(inverse.isfinite(), inverse, 0)

    def decode(self, codes: Tensor) -> Tensor:
        """Dequantized values, float32, of ``codes`` ``(n_blocks, block_size)``."""
        scale = self.scale if self.decode_scale is None else self.decode_scale
        offset = self.offset if self.decode_offset is None else self.decode_offset
        return _affine(_take(self.alphabet, codes), scale, offset)

    def bounds(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end of each weight's cell, float32, shaped like ``codes``."""
        lower = _affine(_take(self.edges, codes), self.scale, self.offset)
        upper = _affine(_take(self.edges[1:], codes), self.scale, self.offset)
        return torch.minimum(lower, upper), torch.maximum(lower, upper)

    def half_widths(self, codes: Tensor) -> Tensor:
        """Half the width of each weight's cell, float32, broadcastable to ``codes``.

        On a uniform grid this is half a step for every symbol, end symbols included: ``(n_blocks, 1)``.
        """
        if self.is_uniform:
            return self.scale.abs() / 2
        return _take(self.edges.diff() / 2, codes).mul_(self.scale.abs())

    def median_half_width(self, codes: Tensor | None, block_sizes: Tensor | int) -> Tensor:
        """Median over all weights of the half-width, a float32 scalar, from block statistics only.

        Args:
            codes: ``(n_blocks, block_size)``; not read (and may be ``None``) on a uniform grid.
            block_sizes: how many weights each block really has, ``(n_blocks,)``, or one number for all.

        On a uniform grid a weighted median over the blocks; else two passes of counting, no sort of all weights.
        """
        n_blocks = self.scale.shape[0]
        sizes = torch.as_tensor(block_sizes, device=self.scale.device).expand(n_blocks)
        if self.is_uniform:
            return weighted_median(self.scale.abs().flatten() / 2, sizes)
        if codes is None:
            raise ValueError("the median half-width of a non-uniform grid needs the codes")
        step = max(1, CHUNK_WEIGHTS // codes.shape[1])
        column = torch.arange(codes.shape[1], device=codes.device)

        def pieces() -> Iterator[Tensor]:
            for start in range(0, n_blocks, step):
                part = slice(start, start + step)
                half_widths = self[part].half_widths(codes[part])
                yield half_widths[column < sizes[part, None]] if ragged else half_widths.flatten()

        ragged = n_blocks > 0 and int(sizes.min()) < codes.shape[1]
        return _median(pieces, int(sizes.sum()))

    def neighbour_below(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """For ``values`` ``(n_blocks, block_size)`` the symbol at or below, and how far on to the next one (0 to 1).

        Measured on the grid that is decoded. Values outside the alphabet's range sit at its end: nothing beyond the
        end can be represented, so no rounding of them is unbiased.
        """
        scale = self.scale if self.decode_scale is None else self.decode_scale
        offset = self.offset if self.decode_offset is None else self.decode_offset
        units = values if offset is None else values - offset
        units = units / scale.where(scale != 0, torch.inf)
        units = units.clamp_(*self.ends)
        if self.is_uniform:
            units -= self.alphabet[0]
            below = units.floor().clamp_(max=len(self.alphabet) - 2)
            return below.long(), units - below
        below = bucketize(units, self.alphabet[1:-1], right=True)
        return below, units.sub_(_take(self.alphabet, below)).div_(_take(self.alphabet.diff(), below))

    def round_stochastically(self, values: Tensor, uniform: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Round each value to one of its two neighbouring symbols so that the decoded result has the value as its mean.

        Args:
            values: ``(n_blocks, block_size)`` float32.
            uniform: independent uniform numbers on (0, 1), same shape; overwritten.
            scratch: for temporaries, and perhaps the result.

        Returns:
            Values (float32) that the quantizer, given the same scales, encodes to exactly the chosen symbols.
        """
        offset = self.offset if self.decode_offset is None else self.decode_offset
        inverse = self.inverse
        scratch = scratch or Scratch()
        shifted = values if offset is None else torch.sub(values, offset, out=scratch.like(values, "shifted"))
        if self.is_uniform:
            return _affine(uniform.addcmul_(shifted, inverse).floor_().clamp_(*self.ends), self.scale, self.offset)
        units = torch.mul(shifted, inverse, out=scratch.like(values, "units"))
        near = neighbours(units, self.alphabet, scratch)
        if near is None:
            below = torch.bucketize(units, self.alphabet[1:-1], right=True)
            near = self.alphabet[below], self.alphabet[below + 1], self.alphabet[below + 1]
        first, second, third = near
        # Up to the second symbol where the value exceeds a random point on the way there; then likewise to the third.
        # Masks are of floats, because torch's CPU kernels for booleans take several times as long.
        point = scratch.like(values, "point")

        def reached(below: Tensor, above: Tensor) -> Tensor:
            # Not `torch.lerp`, which rounds once or twice depending on the processor.
            torch.sub(above, below, out=point).mul_(uniform).add_(below)
            return torch.ge(units, point, out=point)

        chosen = first.lerp_(second, reached(first, second)).lerp_(third, reached(second, third))
        return _affine(chosen, self.scale, self.offset)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each block, ``(n_blocks, 1)``: its scale (and offset) come from weights that are
        one of them. On a symmetric grid they are plus and minus the greatest magnitude.

        Args:
            values: ``(n_blocks, block_size)``.
        """
        least, greatest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        if self.offset is None:
            greatest = torch.maximum(-least, greatest)
            least = -greatest
        return least, greatest

    def sets_scale(self, values: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Which of ``values`` ``(n_blocks, block_size)`` float32 the quantizer takes a block's scale from: 1 or 0.

        Floats, because torch's CPU kernels for booleans take several times as long.
        """
        scratch = scratch or Scratch()
        if self.offset is None:
            magnitude = torch.abs(values, out=scratch.like(values, "magnitude"))
            return torch.eq(magnitude, magnitude.amax(1, keepdim=True), out=magnitude)
        least, greatest = self.extremes(values)
        is_least = torch.eq(values, least, out=scratch.like(values, "least"))
        return torch.maximum(is_least, torch.eq(values, greatest, out=scratch.like(values, "greatest")), out=is_least)

    def on_grid(self, codes: Tensor) -> Tensor:
        """Values that the quantizer, given the same scales, encodes to exactly ``codes``; float32."""
        return _affine(_take(self.alphabet, codes), self.scale, self.offset)


def _take(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``; on the CPU a third of its time."""
    return table.index_select(0, index.int().flatten()).view(index.shape)


def _affine(units: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """In place."""
    units *= scale
    return units if offset is None else units.add_(offset)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Lower weighted median of ``values`` ``(n,)`` with integer ``weights`` ``(n,)``: the value that ``torch.median``
    gives after repeating each value as often as its weight says. Zero total weight gives 0."""
    total = int(weights.sum())
    if total == 0:
        return values.new_zeros(())
    ordered, order = values.sort()
    reached = weights[order].cumsum(0) >= (total + 1) // 2
    return ordered[int(reached.int().argmax())]


def _median(pieces: Callable[[], Iterable[Tensor]], total: int) -> Tensor:
    """``torch.median`` of ``total`` non-negative float32 numbers that come in flat pieces, which are asked for twice.

    Floats of one sign are ordered like their bits: count the upper 16 bits, then the lower 16 where the median is.
    """
    if total == 0:
        return torch.zeros(())
    counts, rank = torch.zeros(1 << 16, dtype=torch.long), (total + 1) // 2
    for piece in pieces():
        counts += torch.bincount(piece.view(torch.int32) >> 16, minlength=1 << 16).cpu()
    reached = counts.cumsum(0)
    upper = int(torch.searchsorted(reached, rank))
    rank -= int(reached[upper] - counts[upper])
    counts.zero_()
    for piece in pieces():
        bits = piece.view(torch.int32)
        counts += torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16).cpu()
    lower = int(torch.searchsorted(counts.cumsum(0), rank))
    return torch.tensor((upper << 16) + lower, dtype=torch.int32).view(torch.float32)


def midpoint_edges(alphabet: Tensor) -> Tensor:
    """Edges of round-to-nearest cells over an ascending ``alphabet``; the outer two are the end symbols."""
    return torch.cat([alphabet[:1], (alphabet[:-1] + alphabet[1:]) / 2, alphabet[-1:]])
