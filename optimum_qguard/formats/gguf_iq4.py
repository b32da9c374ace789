"""GGUF's IQ4_NL: 32 consecutive weights share a scale in float16, and sixteen symbols are spaced as weights are.

ggml searches the scale by weighted least squares and then rounds every weight to the nearest symbol, a tie to the one
above, by the scale in float32; stored, and decoded with, is its float16. libgguf, which reproduces ggml byte for byte,
does that here, and scales and symbols are read out of its blocks. The grid has the stored scale, so a weight within a
float16's rounding (2⁻¹¹ of it) of its cell's end may have the neighbouring symbol. No importance matrix is used.

Source: ``quantize_row_iq4_nl_impl`` in ggml-quants.c; the block layout in ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimum_qguard.formats.buckets import bucketize
from optimum_qguard.formats.format import Quantized, check_finite, register
from optimum_qguard.formats.gguf import GGUFFormat, check_stored
from optimum_qguard.formats.gguf_kquants import as_float16, load_libgguf, unpack
from optimum_qguard.formats.grid import Grid, midpoint_edges

_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_CHUNK_BLOCKS = 1 << 15


@dataclass(frozen=True)
class GGUFIQ4NL(GGUFFormat):
    """IQ4_NL. `grid` and `quantize` run libgguf on the CPU; `encode` rounds to a grid that is already there."""

    kind: str = "iq4_nl"
    fixed_grid = False

    def grid(self, blocks: Tensor) -> Grid:
        return self._search(blocks)[0]

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        units = torch.where(grid.scale != 0, blocks.float() / grid.scale, 0)
        return bucketize(units, grid.edges[1:-1], right=True).to(torch.uint8)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        self._check_columns(weight.shape, name)
        check_finite(weight, name)
        grid, codes = self._search(self.blocks(weight))
        check_stored(grid, name)
        return Quantized(self, grid, codes, weight.shape)

    def _search(self, blocks: Tensor) -> tuple[Grid, Tensor]:
        libgguf = load_libgguf()
        scale = torch.empty(len(blocks), 1)
        codes = torch.empty(blocks.shape, dtype=torch.uint8)
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            part = slice(start, start + _CHUNK_BLOCKS)
            stored = libgguf.quantize_rows(blocks[part].float().cpu().numpy(), libgguf.GGMLQuantizationType.IQ4_NL)
            d, symbols = np.split(stored, [2], axis=1)
            scale[part] = torch.from_numpy(as_float16(d))
            codes[part] = torch.from_numpy(unpack(symbols, 16, 4))
        alphabet = torch.tensor(_VALUES, dtype=torch.float32)
        where = blocks.device
        return Grid(alphabet.to(where), midpoint_edges(alphabet).to(where), scale.to(where)), codes.to(where)


register("gguf-iq4_nl", GGUFIQ4NL)
