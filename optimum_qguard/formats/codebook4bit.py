"""NF4 and FP4 of bitsandbytes: a code book of 4-bit values, one absmax per block of consecutive weights.

NF4 has the quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), FP4 one sign, two
exponent and one mantissa bit. Blocks run over the flattened weight. Symbols are round-to-nearest of w · (1 / absmax)
in float32; a tie goes to the lower value. Double quantization ("compress_statistics") stores the absmax values
themselves in 8 bits, after the symbols were chosen: it changes what is decoded, never which symbol.

In an incomplete last block bitsandbytes' CPU code divides by absmax where elsewhere it multiplies by the reciprocal:
there, and there only, a weight within a last bit of a cell's boundary may get the neighbouring symbol.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from optimum_qguard.formats.absmax import absmax
from optimum_qguard.formats.buckets import bucketize
from optimum_qguard.formats.format import Format, register
from optimum_qguard.formats.grid import Grid, midpoint_edges

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12))
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Codebook4Bit(Format):
    """``bitsandbytes.functional.quantize_4bit``. FP4's two zeros are one symbol here, so it has 15.

    Attributes:
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: how many consecutive weights share an absmax; bitsandbytes knows 32, 64, …, 4096.
        double_quant: whether the absmax values are quantized too.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type is 'nf4' or 'fp4', not {self.quant_type!r}")
        if self.block_size not in _BLOCK_SIZES:
            raise ValueError(f"bitsandbytes has no block size {self.block_size}; it has {_BLOCK_SIZES}")

    def blocks(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        missing = -len(flat) % self.block_size
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(-1, self.block_size)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(-1)[: shape.numel()].view(shape)

    def block_sizes(self, shape: torch.Size, n_blocks: int) -> Tensor | int:
        missing = -shape.numel() % self.block_size
        if not missing:
            return self.block_size
        sizes = torch.full((n_blocks,), self.block_size)
        sizes[-1] -= missing
        return sizes

    def grid(self, blocks: Tensor) -> Grid:
        scale = absmax(blocks).float()
        grid = Grid(*_levels(self.quant_type, blocks.device), scale, keeps_extremes=True)
        if self.double_quant and len(blocks):
            return replace(grid, decode_scale=_nested(scale), keeps_extremes=False)
        return grid

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        units = blocks.float() * (1 / grid.scale.clamp(min=1e-38))
        return bucketize(units, grid.edges[1:-1]).to(torch.uint8)


@cache
def _levels(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    alphabet = torch.tensor(_NF4 if quant_type == "nf4" else _FP4, device=device)
    return alphabet, midpoint_edges(alphabet)


def _nested(scale: Tensor) -> Tensor:
    """What double quantization makes of ``scale`` ``(n_blocks, 1)``: its mean, plus 8-bit steps of the rest."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat = scale.flatten()
    mean = flat.mean()
    rest: Tensor = dequantize_blockwise(*quantize_blockwise(flat - mean, blocksize=256))
    return (rest + mean).view_as(scale)


for _type in ("nf4", "fp4"):
    register(_type, partial(Codebook4Bit, _type))
    register(f"{_type}-double", partial(Codebook4Bit, _type, double_quant=True))
