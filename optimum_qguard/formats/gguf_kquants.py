"""GGUF's K-quants Q2_K to Q6_K: 256 weights in sub-blocks, whose scales and offsets are themselves quantized.

====== ========= ============================= ======================================
type   sub-block value of a symbol             super-block of 256
====== ========= ============================= ======================================
Q2_K   16        d·sc·(0 … 3) - dmin·m         d, dmin in float16; sc, m in 4 bits
Q3_K   16        d·sc·(-4 … 3)                 d in float16; sc in 6 bits, signed
Q4_K   32        d·sc·(0 … 15) - dmin·m        d, dmin in float16; sc, m in 6 bits
Q5_K   32        d·sc·(0 … 31) - dmin·m        d, dmin in float16; sc, m in 6 bits
Q6_K   16        d·sc·(-32 … 31)               d in float16; sc in 8 bits, signed
====== ========= ============================= ======================================

ggml searches the scales by weighted least squares. libgguf, which reproduces ggml byte for byte, does that here, and
scales, offsets and symbols are read out of its blocks. No importance matrix is used: with one, llama.cpp finds other
scales.

After the search ggml rounds every weight to the nearest symbol of the *stored* grid, half to even, so a weight lies in
its symbol's cell, but for two cases: beyond the ends it is clamped, and the search may leave many weights there; and a
sub-block whose stored scale is 0 keeps the symbols of the search, all of which decode to the same value.

Source: ``quantize_row_q4_K_ref`` and its siblings in ggml-quants.c; block layouts in ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_qguard.formats.format import Quantized, check_finite, register
from optimum_qguard.formats.gguf import GGUFFormat, check_stored
from optimum_qguard.formats.grid import Grid

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Read = tuple[Floats, Floats | None, Bytes]

_SUPER_BLOCK = 256
_CHUNK_SUPER_BLOCKS = 1 << 12


@dataclass(frozen=True)
class GGUFKQuant(GGUFFormat):
    """One K-quant. `grid` and `quantize` run libgguf on the CPU; `encode` rounds to a grid that is already there."""

    fixed_grid = False

    @property
    def block_size(self) -> int:
        return 32 if self.kind in ("q4_k", "q5_k") else 16

    @property
    def row_multiple(self) -> int:
        return _SUPER_BLOCK

    def grid(self, blocks: Tensor) -> Grid:
        return self._search(blocks)[0]

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        units = blocks.float() if grid.offset is None else blocks.float() - grid.offset
        units = torch.where(grid.scale != 0, units / grid.scale, 0).round_()
        first, last = float(grid.alphabet[0]), float(grid.alphabet[-1])
        return units.clamp_(first, last).sub_(first).to(torch.uint8)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        self._check_columns(weight.shape, name)
        check_finite(weight, name)
        grid, codes = self._search(self.blocks(weight))
        check_stored(grid, name)
        return Quantized(self, grid, codes, weight.shape)

    def _search(self, blocks: Tensor) -> tuple[Grid, Tensor]:
        libgguf = load_libgguf()
        read, first, last = _LAYOUTS[self.kind]
        weights = blocks.reshape(-1, _SUPER_BLOCK)
        scale = torch.empty(blocks.shape[0], 1)
        offset = torch.empty(blocks.shape[0], 1) if first == 0 else None
        codes = torch.empty(blocks.shape, dtype=torch.uint8)
        per_super_block = _SUPER_BLOCK // self.block_size
        for start in range(0, len(weights), _CHUNK_SUPER_BLOCKS):
            rows = weights[start : start + _CHUNK_SUPER_BLOCKS].float().cpu().numpy()
            stored = libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[self.kind.upper()])
            with np.errstate(invalid="ignore"):
                sub_scale, sub_offset, symbols = read(stored)
            part = slice(start * per_super_block, (start + len(rows)) * per_super_block)
            scale[part] = torch.from_numpy(sub_scale.reshape(-1, 1))
            codes[part] = torch.from_numpy(symbols.reshape(-1, self.block_size))
            if offset is not None and sub_offset is not None:
                offset[part] = torch.from_numpy(sub_offset.reshape(-1, 1))
        alphabet = torch.arange(first, last + 1.0)
        edges = torch.arange(first - 0.5, last + 1)
        edges[0], edges[-1] = first, last
        where = blocks.device
        grid = Grid(alphabet.to(where), edges.to(where), scale.to(where), None if offset is None else offset.to(where))
        return grid, codes.to(where)


def load_libgguf() -> ModuleType:
    """libgguf.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    try:
        import libgguf
    except ImportError as error:
        raise ImportError("this GGUF type needs libgguf: pip install 'optimum-qguard[gguf]'") from error
    module: ModuleType = libgguf
    return module


def as_float16(stored: Bytes) -> Floats:
    """Bytes of float16 numbers, ``(rows, 2 * numbers)``, as those numbers."""
    return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)


def unpack(stored: Bytes, run: int, bits: int) -> Bytes:
    """The ``bits``-bit numbers of each row: every run of ``run`` bytes holds ``8 / bits`` runs, low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers: Bytes = (stored.reshape(len(stored), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return numbers.reshape(len(stored), -1)


def _join(low: NDArray[Any], high: NDArray[Any], bits: int) -> Bytes:
    """Numbers of which ``low`` holds the last ``bits`` bits."""
    joined: Bytes = low | np.left_shift(high, bits, dtype=np.uint8)
    return joined


def _read_q2_k(stored: Bytes) -> Read:
    sub, low, d, dmin = np.split(stored, [16, 80, 82], axis=1)
    return as_float16(d) * (sub & 15), -as_float16(dmin) * (sub >> 4), unpack(low, 32, 2)


def _read_q3_k(stored: Bytes) -> Read:
    high, low, sub, d = np.split(stored, [32, 96, 108], axis=1)
    scale = _join(unpack(sub[:, :8], 8, 4), unpack(sub[:, 8:], 4, 2), 4).astype(np.int8) - np.int8(32)
    return as_float16(d) * scale, None, _join(unpack(low, 32, 2), unpack(high, 32, 1), 2)


def _read_q4_k(stored: Bytes) -> Read:
    d, dmin, sub, low = np.split(stored, [2, 4, 16], axis=1)
    scale, offset = _six_bit_pairs(sub)
    return as_float16(d) * scale, -as_float16(dmin) * offset, unpack(low, 32, 4)


def _read_q5_k(stored: Bytes) -> Read:
    d, dmin, sub, high, low = np.split(stored, [2, 4, 16, 48], axis=1)
    scale, offset = _six_bit_pairs(sub)
    return as_float16(d) * scale, -as_float16(dmin) * offset, _join(unpack(low, 32, 4), unpack(high, 32, 1), 4)


def _read_q6_k(stored: Bytes) -> Read:
    low, high, sub, d = np.split(stored, [128, 192, 208], axis=1)
    scale = np.ascontiguousarray(sub).view(np.int8)
    return as_float16(d) * scale, None, _join(unpack(low, 64, 4), unpack(high, 32, 2), 4)


def _six_bit_pairs(sub: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight offsets from twelve bytes; the last four pairs are spread over all of them."""
    scale, offset, rest = np.split(sub, 3, axis=1)
    scales = np.concatenate([scale & 63, _join(rest & 15, scale >> 6, 4)], axis=1)
    offsets = np.concatenate([offset & 63, _join(rest >> 4, offset >> 6, 4)], axis=1)
    return scales, offsets


_LAYOUTS: dict[str, tuple[Callable[[Bytes], Read], int, int]] = {
    "q2_k": (_read_q2_k, 0, 3),
    "q3_k": (_read_q3_k, -4, 3),
    "q4_k": (_read_q4_k, 0, 15),
    "q5_k": (_read_q5_k, 0, 31),
    "q6_k": (_read_q6_k, -32, 31),
}


def _factory(kind: str) -> Callable[[], GGUFKQuant]:
    return lambda: GGUFKQuant(kind)


for _kind in _LAYOUTS:
    register(f"gguf-{_kind}", _factory(_kind))
