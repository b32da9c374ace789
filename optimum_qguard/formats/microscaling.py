"""Microscaling formats of FP4 (E2M1) symbols: MXFP4 and NVFP4, as torchao's ``prototype.mx_formats`` writes them.

MXFP4 (OCP Microscaling Formats v1.0): 32 weights of a row share a power of two (E8M0). How it is found from the block's
absmax ``a`` is the *scale rule*; weights beyond the last symbol are clamped to it:

=========  ==========================================  =============  ==================================
rule       scale                                       a / scale      default of
=========  ==========================================  =============  ==================================
``rceil``  2^ceil(log2(a / 6))                         3 to 6         ``MXDynamicActivationMXWeightConfig``
``floor``  2^(floor(log2 a) - 2)                       4 to 8         ``MXTensor.to_mx``
``even``   ``floor`` after rounding a to two bits      3.5 to 7
``ceil``   2^(ceil(log2 a) - 2)                        2 to 4
=========  ==========================================  =============  ==================================

NVFP4 (NVIDIA): 16 weights share an E4M3 scale; a second scale, absmax / (448 · 6) in float32, is the whole tensor's.

torchao rounds halfway weights to the symbol with the even code; ggml, whose MXFP4 uses the ``floor`` rule, to the
smaller magnitude. On-grid weights are exact in bfloat16 for MXFP4, near enough for NVFP4, and come back as their
symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optimum_qguard.formats.format import Format, Quantized, WeightError, register
from optimum_qguard.formats.grid import Grid
from optimum_qguard.formats.reciprocal_grid import ReciprocalGrid

ScaleRule = Literal["rceil", "floor", "even", "ceil"]

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_REACH = {"rceil": 6.0, "floor": 8.0, "even": 7.0, "ceil": 6.0}


@dataclass(frozen=True)
class _Float4(Format):
    block_size: ClassVar[int]

    def blocks(self, weight: Tensor) -> Tensor:
        self._check_columns(weight.shape, "tensor")
        return weight.reshape(weight.numel() // self.block_size, self.block_size)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        self._check_columns(weight.shape, name)
        return super().quantize(weight, name)

    def _check_columns(self, shape: torch.Size, name: str) -> None:
        columns = shape[-1] if shape else 1
        if columns % self.block_size:
            raise WeightError(
                f"{name}: {columns} columns are not a multiple of {self.block_size}, which torchao and ggml refuse; "
                "leave this tensor out of the quantization"
            )


@dataclass(frozen=True)
class MXFP4(_Float4):
    """E2M1 symbols with a power-of-two scale per 32 weights.

    The end symbols' cells reach as far as the scale rule lets weights lie beyond them. A block of zeros has scale 0.

    Attributes:
        scale_rule: see the module.
        ties: where a weight halfway between two symbols goes.
    """

    block_size: ClassVar[int] = 32
    scale_rule: ScaleRule = "rceil"
    ties: Literal["even", "toward zero"] = "even"

    def grid(self, blocks: Tensor) -> Grid:
        alphabet, edges = _alphabet_and_edges(_REACH[self.scale_rule], blocks.device)
        low, high = (extreme.float() for extreme in torch.aminmax(blocks, dim=1, keepdim=True))
        absmax = torch.maximum(-low, high)
        if self.scale_rule == "rceil":
            exponent = (absmax / 6).log2().ceil()
        else:
            if self.scale_rule == "even":
                absmax = ((absmax.view(torch.int32) + (1 << 21)) & (0x1FF << 23)).view(torch.float32)
            mantissa, exponent = torch.frexp(absmax)
            exponent = exponent - 3  # frexp's mantissa is half of the usual one
            if self.scale_rule == "ceil":
                exponent = exponent + (mantissa > 0.5)
        scale = torch.exp2(exponent.clamp(-126, 127).float())
        return Grid(alphabet, edges, torch.where(absmax > 0, scale, 0))

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        return _nearest(torch.where(grid.scale > 0, blocks.float() / grid.scale, 0), self.ties)


@dataclass(frozen=True)
class NVFP4(_Float4):
    """E2M1 symbols with an E4M3 scale per 16 weights.

    The whole tensor has one second scale, experts included; torchao gives each expert its own, so quantize them one by
    one. Scales below 2⁻⁶ (of the tensor's) are raised to it, scales above 448 cut to it. In a tensor of zeros torchao
    divides 0 by 0; its symbols are 0 here.

    Attributes:
        tensor_scale: whether there is a second scale.
    """

    block_size: ClassVar[int] = 16
    tensor_scale: bool = True

    def grid(self, blocks: Tensor) -> Grid:
        alphabet, edges = _alphabet_and_edges(6.375, blocks.device)  # an E4M3 scale may be 1/17 below its block's
        low, high = (extreme.float() for extreme in torch.aminmax(blocks, dim=1, keepdim=True))
        absmax = torch.maximum(-low, high)
        outer = absmax.new_ones(())
        if self.tensor_scale and len(blocks):
            outer = absmax.amax() / (448 * 6)
        scale = (absmax / 6 / outer).nan_to_num_(0).clamp_(2.0**-6, 448).to(torch.float8_e4m3fn).float()
        factor = torch.where(outer > 0, 1 / outer / scale, 0)
        return ReciprocalGrid(alphabet, edges, outer * scale, factor=factor)

    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        factor = grid.factor if isinstance(grid, ReciprocalGrid) and grid.factor is not None else 1 / grid.scale
        return _nearest(blocks.float() * factor, "even")


def _alphabet_and_edges(reach: float, device: torch.device) -> tuple[Tensor, Tensor]:
    magnitudes, middles = torch.tensor(_MAGNITUDES, device=device), torch.tensor(_MIDDLES, device=device)
    edges = torch.cat([middles, torch.tensor([reach], device=device)])
    return torch.cat([-magnitudes[1:].flip(0), magnitudes]), torch.cat([-edges.flip(0), edges])


def _nearest(units: Tensor, ties: Literal["even", "toward zero"]) -> Tensor:
    edges = torch.tensor(_MIDDLES, device=units.device)
    above = torch.nextafter(edges, edges.new_tensor(torch.inf))
    odd = torch.arange(len(_MIDDLES), device=units.device) % 2 == 1
    boundaries = above if ties == "toward zero" else torch.where(odd, edges, above)
    magnitude = torch.bucketize(units.abs(), boundaries, right=True, out_int32=True)
    return torch.where(units < 0, 7 - magnitude, 7 + magnitude).to(torch.uint8)


def _mxfp4(scale_rule: ScaleRule, ties: Literal["even", "toward zero"] = "even") -> Callable[[], Format]:
    return lambda: MXFP4(scale_rule, ties)


register("mxfp4", _mxfp4("rceil"))
register("mxfp4-floor", _mxfp4("floor"))
register("gguf-mxfp4", _mxfp4("floor", "toward zero"))
register("nvfp4", NVFP4)
