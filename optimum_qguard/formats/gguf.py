"""GGUF's block types of llama.cpp's ggml: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. The K-quants are in ``gguf_kquants.py``,
IQ4_NL is in ``gguf_iq4.py``.

Thirty-two consecutive weights share a scale ``d`` (and in the ``_1`` types an offset, the block's minimum):

===== ================ ============== =========================
type  d                symbols        rounding of w/d
===== ================ ============== =========================
Q4_0  m / -8           -8 … 7         half up
Q5_0  m / -16          -16 … 15       half up
Q4_1  (max - min)/15   0 … 15         half up
Q5_1  (max - min)/31   0 … 31         half up
Q8_0  absmax / 127     -127 … 127     half away from zero
===== ================ ============== =========================

where m is the weight of largest magnitude with its sign (the first one of equals), so that ``d`` may be negative and
the side opposite to m ends at 7 or 15, to which ggml clamps what lies beyond. Symbols are chosen with ``d`` and the
minimum in float32; they are stored in float16, hence the grid's ``decode_scale`` and ``decode_offset``.

On-grid weights come back as their symbols in float32, and in bfloat16 and float16 as long as the dtype can tell the
symbols apart: around an offset far from zero it may not (in bfloat16, a block whose range is below 12 % of its largest
magnitude for Q4_1, 25 % for Q5_1; in float16, one whose ``d`` is not above its smallest step, 2⁻²⁴).

Source: ``quantize_row_q4_0_ref`` and its siblings in ggml-quants.c, without an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.formats.format import Format, Quantized, WeightError, register
from optimum_qguard.formats.grid import Grid

_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def fallback_for(name: str, columns: int) -> str | None:
    """The format that llama.cpp really gives a tensor meant for format ``name``, by its number of input features.

    K-quants need a multiple of 256; otherwise llama.cpp takes a 32-weight type of about the same size, and float16
    (``None``: not quantized) if 32 does not divide the columns either.

        >>> fallback_for("gguf-q4_k", 576)
        'gguf-q5_0'

    Raises:
        WeightError: a 32-weight type whose columns are not a multiple of 32, which llama.cpp refuses to quantize.
        ValueError: not a GGUF format.
    """
    kind = name.removeprefix("gguf-")
    if kind in _FALLBACKS:
        if columns % 256 == 0:
            return name
        return None if columns % 32 else f"gguf-{_FALLBACKS[kind]}"
    if kind not in _OF_32_WEIGHTS:
        raise ValueError(f"{name!r} is not a GGUF format; known: {', '.join(sorted([*_FALLBACKS, *_OF_32_WEIGHTS]))}")
    if columns % 32:
        raise WeightError(f"{name} needs a multiple of 32 columns, not {columns}: llama.cpp refuses such a tensor")
    return name


@dataclass(frozen=True)
class GGUFFormat(Format):
    """What all GGUF types share: blocks of consecutive weights of a row, and no incomplete ones.

    Attributes:
        kind: the type's name without ``gguf-``.
    """

    kind: str

    @property
    def block_size(self) -> int:
        """How many weights share a scale."""
        return 32

    @property
    def row_multiple(self) -> int:
        """What the number of columns must be a multiple of."""
        return 32

    def blocks(self, weight: Tensor) -> Tensor:
        self._check_columns(weight.shape, "tensor")
        return weight.reshape(weight.numel() // self.block_size, self.block_size)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        self._check_columns(weight.shape, name)
        quantized = super().quantize(weight, name)
        check_stored(quantized.grid, name)
        return quantized

    def _check_columns(self, shape: torch.Size, name: str) -> None:
        columns = shape[-1] if shape else 1
        if columns % self.row_multiple == 0:
            return
        advice = "llama.cpp refuses to quantize it"
        if self.kind in _FALLBACKS:
            fallback = fallback_for(f"gguf-{self.kind}", columns)
            advice = "llama.cpp leaves it in float16" if fallback is None else f"llama.cpp uses {fallback}: do the same"
        raise WeightError(
            f"{name}: {columns} columns, and gguf-{self.kind} needs a multiple of {self.row_multiple}; {advice}"
        )


@dataclass(frozen=True)
class GGUFBlockFormat(GGUFFormat):
    """Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, computed here: they need no search."""

    def grid(self, blocks: Tensor) -> Grid:
        first, last = _SYMBOLS[self.kind]
        alphabet = torch.arange(first, last + 1.0, device=blocks.device)
        edges = torch.arange(first - 0.5, last + 1, device=blocks.device)
        edges[0] = first
        edges[-1] = -first if self.kind in ("q4_0", "q5_0") else last
        low, high = (extreme.float() for extreme in torch.aminmax(blocks, dim=1, keepdim=True))
        offset = None
        if first == 0:
            scale, offset = (high - low) / last, low
        elif self.kind == "q8_0":
            scale = torch.maximum(-low, high) / last
        else:
            scale = _signed_absmax(blocks, low, high) / first
        return Grid(alphabet, edges, scale, offset, _half(scale), None if offset is None else _half(offset))

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        first, last = _SYMBOLS[self.kind]
        units = blocks.float() if grid.offset is None else blocks.float() - grid.offset
        units = units * torch.where(grid.scale != 0, 1 / grid.scale, 0)
        if self.kind == "q8_0":
            whole = units.trunc()
            units = whole + (units - whole).mul_(2).trunc_()  # the fraction is exact, so half goes away from zero
            return units.clamp_(first, last).sub_(first).to(torch.uint8)
        return units.add_(0.5 - first).clamp_(0, last - first).to(torch.uint8)


def _signed_absmax(blocks: Tensor, low: Tensor, high: Tensor) -> Tensor:
    signed = torch.where(high > -low, high, low)
    tied = ((high == -low) & (high > 0)).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        rows = blocks[tied]
        signed[tied] = rows.gather(1, rows.abs().argmax(1, keepdim=True)).float()
    return signed


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def check_stored(grid: Grid, name: str) -> None:
    """Raise `WeightError` where a scale or an offset does not fit in float16."""
    for stored in (grid.scale, grid.decode_scale, grid.decode_offset):
        if stored is not None and not bool(stored.isfinite().all()):
            raise WeightError(f"{name}: weights too large for GGUF's float16 scales; llama.cpp refuses them as well")


def _factory(kind: str) -> Callable[[], Format]:
    return lambda: GGUFBlockFormat(kind)


_SYMBOLS = {"q4_0": (-8, 7), "q4_1": (0, 15), "q5_0": (-16, 15), "q5_1": (0, 31), "q8_0": (-127, 127)}
_OF_32_WEIGHTS = (*_SYMBOLS, "iq4_nl")

for _kind in _SYMBOLS:
    register(f"gguf-{_kind}", _factory(_kind))
