"""Affine grids: equally spaced symbols, one scale (and zero point) per group of weights along the input dimension.

What is common to GPTQ, torchao's and quanto's integer formats: how groups are cut out of a weight. How a group's scale
is chosen and in which dtype the arithmetic runs differs from library to library: see ``gptq``, ``torchao_int`` and
``quanto_int``.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from optimum_qguard.formats.format import Format
from optimum_qguard.formats.grid import midpoint_edges


class AffineGroup(Format):
    """Groups of weights along the last dimension; a row's last group is padded if it is incomplete."""

    @abstractmethod
    def group_of(self, shape: torch.Size) -> int:
        """How many neighbouring weights of a row share a scale in a weight of that shape, at least 1.

        Raises:
            WeightError: the library cannot quantize that shape.
        """

    def blocks(self, weight: Tensor) -> Tensor:
        group = self.group_of(weight.shape)
        if weight.numel() == 0:
            return weight.reshape(0, group)
        missing = -weight.shape[-1] % group
        if missing:
            weight = torch.nn.functional.pad(weight, (0, missing))
        return weight.reshape(-1, group)

    def unblock(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        columns = shape[-1] + -shape[-1] % blocks.shape[1]
        return blocks.reshape(*shape[:-1], columns)[..., : shape[-1]]

    def block_sizes(self, shape: torch.Size, n_blocks: int) -> Tensor | int:
        group = self.group_of(shape)
        missing = -shape[-1] % group
        if not missing or not n_blocks:
            return group
        row = torch.full((-(-shape[-1] // group),), group)
        row[-1] -= missing
        return row.repeat(n_blocks // len(row))


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each block, ``(n_blocks, 1)``, in the blocks' dtype."""
    # Two reductions take half the time that torch.aminmax takes along a dimension.
    return blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)


@cache
def signed_levels(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Alphabet −2^(b−1) … 2^(b−1) − 1 and its edges, half a step further out at the top, where such formats clamp."""
    alphabet = torch.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1), device=device)
    edges = midpoint_edges(alphabet)
    edges[-1] += 0.5
    return alphabet, edges


@cache
def unsigned_levels(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Alphabet 0 … 2^b − 1 and its edges."""
    alphabet = torch.arange(2.0**bits, device=device)
    return alphabet, midpoint_edges(alphabet)
