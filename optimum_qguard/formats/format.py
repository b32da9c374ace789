"""What a quantization format is: how it cuts a tensor into blocks, lays a grid over them, and picks symbols."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimum_qguard.formats.grid import Grid
from optimum_qguard.formats.scratch import CHUNK_WEIGHTS as _CHUNK_WEIGHTS
from optimum_qguard.registry import Registry


class WeightError(ValueError):
    """A weight that cannot be quantized as it is (NaN, infinity, wrong shape); the message names the tensor."""


class Format(ABC):
    """One format of one quantizer, a pure function of a tensor.

    Weights are ``(out_features, in_features)`` as the quantizer sees them (a ``Conv1D`` weight is transposed first) or
    ``(experts, out_features, in_features)``; dtype float32, float16 or bfloat16; on any device. Subclasses are frozen
    dataclasses of their parameters and implement four methods; the rest follows.

    Attributes:
        fixed_grid: whether the grid depends only on each block's extreme values (no search, no calibration), so that a
            weight moved to another point of the grid comes back from the quantizer as exactly that symbol; in every
            dtype (see `fixed_for`).
    """

    fixed_grid: bool = True

    @abstractmethod
    def blocks(self, weight: Tensor) -> Tensor:
        """The weight as ``(n_blocks, block_size)``, a view where the layout allows; a last incomplete block is padded
        with zeros (see `block_sizes`)."""

    @abstractmethod
    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `blocks`: drops the padding and restores ``shape``."""

    @abstractmethod
    def grid(self, blocks: Tensor) -> Grid:
        """The grid that the quantizer chooses for ``blocks`` ``(n_blocks, block_size)``."""

    @abstractmethod
    def encode(self, blocks: Tensor, grid: Grid) -> Tensor:
        """Symbols (indices into ``grid.alphabet``, uint8), bit for bit as the quantizer chooses them, ties and clamping
        included."""

    def fixed_for(self, dtype: torch.dtype) -> bool:
        """`fixed_grid` for weights of one dtype: a quantizer that computes in the weight's own dtype may lose symbols
        in bfloat16 that it keeps in float32."""
        return self.fixed_grid

    def keeps_symbols(self, dtype: torch.dtype) -> bool:
        """Whether a weight that was moved to another point of the grid comes back as that symbol, but for few of them:
        also where the quantizer moves weights afterwards, if by far less than a step."""
        return self.fixed_for(dtype)

    def block_sizes(self, shape: torch.Size, n_blocks: int) -> Tensor | int:
        """How many weights each block holds, padding not counted: one number, or ``(n_blocks,)`` int64."""
        return shape.numel() // max(n_blocks, 1)

    def quantize(self, weight: Tensor, name: str = "tensor") -> Quantized:
        """Lay the grid and pick the symbols.

        Args:
            weight: see the class.
            name: what errors call the tensor.

        Raises:
            WeightError: NaN or infinite weights, or a shape that the format cannot hold.
        """
        check_finite(weight, name)
        blocks = self.blocks(weight)
        grid = self.grid(blocks)
        codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
        for part in block_ranges(blocks):
            codes[part] = self.encode(blocks[part], grid[part])
        return Quantized(self, grid, codes, weight.shape)


@dataclass(frozen=True)
class Quantized:
    """A tensor's symbols together with the grid that gives them meaning; every view of it has the weight's shape."""

    format: Format
    grid: Grid
    block_codes: Tensor
    shape: torch.Size

    def _shaped(self, blocks: Tensor) -> Tensor:
        return self.format.unblock(blocks.expand(self.block_codes.shape), self.shape)

    @property
    def codes(self) -> Tensor:
        """Indices into ``grid.alphabet``, uint8."""
        return self._shaped(self.block_codes)

    def dequantize(self) -> Tensor:
        """The values that inference uses, float32."""
        return self._shaped(self.grid.decode(self.block_codes))

    def symbols(self) -> Tensor:
        """Where each weight's symbol lies on the grid that is encoded to, float32. That is `dequantize` unless the
        quantizer stores its scales rounded."""
        return self._shaped(replace(self.grid, decode_scale=None, decode_offset=None).decode(self.block_codes))

    def half_widths(self) -> Tensor:
        """Half-width of each weight's cell, float32."""
        return self._shaped(self.grid.half_widths(self.block_codes))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of each weight's cell, float32."""
        lower, upper = self.grid.bounds(self.block_codes)
        return self._shaped(lower), self._shaped(upper)

    def median_half_width(self) -> float:
        """``h`` of equation (3): the median half-width over the tensor, in the weight's units."""
        sizes = self.format.block_sizes(self.shape, self.block_codes.shape[0])
        return float(self.grid.median_half_width(self.block_codes, sizes))


def block_ranges(blocks: Tensor) -> Iterator[slice]:
    """Cut ``blocks`` ``(n_blocks, block_size)`` into ranges of blocks whose float32 temporaries stay in the CPU's cache
    (or fill an accelerator), so that no pass over a tensor needs temporaries of the tensor's size."""
    weights = _CHUNK_WEIGHTS if blocks.device.type == "cpu" else 64 * _CHUNK_WEIGHTS
    step = max(1, weights // max(blocks.shape[1], 1))
    for start in range(0, blocks.shape[0], step):
        yield slice(start, min(start + step, blocks.shape[0]))


def check_finite(weight: Tensor, name: str) -> None:
    """Raise `WeightError` naming the tensor and its first bad element, if any element is NaN or infinite."""
    if weight.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        return
    bad = (~torch.isfinite(weight)).nonzero()
    kind = "NaN" if bool(torch.isnan(weight).any()) else "infinite"
    raise WeightError(
        f"{name}: {len(bad)} {kind} weight(s), the first at {tuple(bad[0].tolist())}; "
        "a checkpoint with such weights cannot be quantized: get it from its publisher again"
    )


_REGISTRY: Registry[Callable[[], Format]] = Registry("format", "optimum_qguard.formats")


def register(name: str, factory: Callable[[], Format]) -> None:
    """Make a format known by name. Called at the end of each format's file."""
    _REGISTRY.add(name, factory)
