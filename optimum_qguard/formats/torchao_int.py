"""torchao's integer weight-only formats.

=====================================  =======================================================================
config                                 format
=====================================  =======================================================================
``Int8WeightOnlyConfig``               ``TorchaoInt(scale_dtype=torch.float32, eps=2**-23)``, "torchao-int8"
``IntxWeightOnlyConfig``               ``TorchaoInt(bits, group_size, mapping, scale_dtype)``, "torchao-intx4"
``Int4WeightOnlyConfig`` (tinygemm)    ``TorchaoInt4()``, "torchao-int4"
``PrototypeInt4WeightOnlyConfig``      ``TorchaoInt4(eps=1e-6)``: the one int4 of torchao that runs on the CPU
=====================================  =======================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from optimum_qguard.formats.absmax import absmax
from optimum_qguard.formats.affine_group import AffineGroup, extremes, signed_levels, unsigned_levels
from optimum_qguard.formats.format import Quantized, WeightError, register
from optimum_qguard.formats.grid import Grid


class _TorchaoGroup(AffineGroup):
    """torchao cuts rows into whole groups only."""

    group_size: int | None

    def group_of(self, shape: torch.Size) -> int:
        if self.group_size is None:
            return max(shape.numel(), 1)
        if self.group_size == -1:
            return max(shape[-1], 1)
        if shape[-1] % self.group_size:
            raise WeightError(
                f"{shape[-1]} input features are no multiple of the group size {self.group_size}, so torchao cannot "
                "quantize this weight: choose a group size that divides it, or leave its module out"
            )
        return self.group_size

    def blocks(self, weight: Tensor) -> Tensor:
        return super().blocks(weight.reshape(1, -1) if self.group_size is None else weight)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape) if self.group_size is None else super().unblock(blocks, shape)

    def block_sizes(self, shape: torch.Size, n_blocks: int) -> Tensor | int:
        return shape.numel() if self.group_size is None else super().block_sizes(shape, n_blocks)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        try:
            self.group_of(weight.shape)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None
        return super().quantize(weight, name)


@dataclass(frozen=True)
class TorchaoInt(_TorchaoGroup):
    """torchao's ``choose_qparams_affine`` and ``quantize_affine``: integers and an integer zero point.

    The scale is chosen in the weight's dtype, and the symbols in the wider of that and ``scale_dtype``.

    The grid is not fixed where the zero point is an integer (the group's least symbol then lies up to half a step
    beyond its least weight: a weight moved there changes the scale), nor where 8-bit symbols are computed in BF16,
    whose 8 digits cannot hold them exactly enough.

    Attributes:
        bits: 1 to 8.
        group_size: -1 for one scale per row, ``None`` for one per tensor.
        mapping: ``torchao.quantization.MappingType``, in lower case. The symmetric scale is absmax / (2^b − 1) · 2, so
            that the greatest weight lies half a step beyond the last symbol and clamps.
        scale_dtype: dtype the scale is stored in; ``None`` for the weight's.
        eps: the least scale; ``None`` for the least normal number of the weight's dtype.
    """

    bits: int = 8
    group_size: int | None = -1
    mapping: Literal["symmetric", "symmetric_no_clipping_err", "asymmetric"] = "symmetric"
    scale_dtype: torch.dtype | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is 2 to 8, not {self.bits}")
        exact = self.bits < 8 or self.scale_dtype == torch.float32
        object.__setattr__(self, "fixed_grid", exact and self.mapping != "asymmetric")

    def fixed_for(self, dtype: torch.dtype) -> bool:
        return self.mapping != "asymmetric" and (self.fixed_grid or dtype != torch.bfloat16)

    def grid(self, blocks: Tensor) -> Grid:
        least = torch.finfo(blocks.dtype).smallest_normal if self.eps is None else self.eps
        half = 2 ** (self.bits - 1)
        if self.mapping == "symmetric":
            scale = (absmax(blocks) / (float(2 * half - 1) / 2)).clamp(min=least)
            return Grid(*signed_levels(self.bits, blocks.device), self._stored(scale), first=1)
        low, high = extremes(blocks)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.mapping == "asymmetric":
            scale = ((high - low) / float(2 * half - 1)).clamp(min=least)
            zero_point = (-half - (low / scale).round()).clamp(-half, half - 1)
            stored = self._stored(scale)
            return Grid(
                *unsigned_levels(self.bits, blocks.device), stored, offset=-(zero_point.float() + half) * stored
            )
        scale = torch.maximum(low / float(-half), high / float(half - 1)).clamp(min=least)
        return Grid(*signed_levels(self.bits, blocks.device), self._stored(scale))

    def _stored(self, scale: Tensor) -> Tensor:
        return scale.to(self.scale_dtype or scale.dtype).float()

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        scale = grid.scale.to(self.scale_dtype or blocks.dtype)
        units = (blocks * (1 / scale)).round_()
        half = 2 ** (self.bits - 1)
        zero_point = 0 if grid.offset is None else (-grid.offset / grid.scale).round_() - half
        return (units + zero_point).clamp_(-half, half - 1).add_(half).to(torch.uint8)


@dataclass(frozen=True)
class TorchaoInt4(_TorchaoGroup):
    """torchao's tinygemm int4: 16 levels from the group's least to its greatest weight, zero point in floating point.

    Arithmetic runs in the weight's dtype. What is stored is the value of symbol 8, from which decoding starts.
    Int4WeightOnlyConfig's "plain" packing (CUDA with mslk) does the same arithmetic in float32: the scale may differ in
    the last bit of a BF16 weight's dtype.

    Attributes:
        group_size: torchao knows 32, 64, 128 and 256.
        eps: the least scale; ``None`` for the least normal number of the weight's dtype.
    """

    group_size: int | None = 128
    eps: float | None = None

    def grid(self, blocks: Tensor) -> Grid:
        low, high = extremes(blocks)
        least = torch.finfo(blocks.dtype).smallest_normal if self.eps is None else self.eps
        scale = ((high - low) / 15.0).clamp(min=least)
        middle = low + scale * 8.0
        start = middle - scale * 8.0
        return Grid(
            *unsigned_levels(4, blocks.device),
            scale.float(),
            offset=start.float(),
            decode_offset=middle.float() - 8 * scale.float(),
        )

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        assert grid.offset is not None
        units = (blocks - grid.offset.to(blocks.dtype)) / grid.scale.to(blocks.dtype)
        return units.round_().clamp_(0, 15).to(torch.uint8)


register("torchao-int8", partial(TorchaoInt, scale_dtype=torch.float32, eps=2.0**-23))
register("torchao-intx4", partial(TorchaoInt, bits=4, group_size=32))
register("torchao-int4", TorchaoInt4)
