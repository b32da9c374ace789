"""Dense mode: an invertible matrix on the channels of each key-value head, between value and output projection.

The output projection's columns are multiplied by ``S`` and the value projection's rows (and bias) by ``S^-1``. It is
computed in float64 and rounded once, so that, unlike powers of two, it does not give all bits back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.sites import Part, Site

Blocks = Callable[[int], tuple[Tensor, Tensor]]
"""For the number of a block of channels its matrix and the inverse of that, both ``(size, size)`` float64."""


class Mixing:
    """What dense mode does to one tensor.

    Args:
        name: the tensor's name, for errors.
        parts: its parts in sites, each with the size of the site's blocks and their matrices.
    """

    def __init__(self, name: str, parts: Iterable[tuple[Part, int, Blocks]]) -> None:
        self._name = name
        self._parts = list(parts)

    def apply(self, tensor: Tensor, *, inverse: bool = False) -> Tensor:
        """The mixed tensor, in the dtype of ``tensor``, every entry rounded once.

        Args:
            tensor: the whole of it; not changed.
            inverse: the way back, which gives ``tensor`` up to rounding.

        Raises:
            EncryptError: a weight overflows.
        """
        mixed = tensor.clone()
        for part, size, blocks in self._parts:
            axis, positions = _positions(part, size)
            channels = mixed.movedim(axis, -1)
            for block, where in enumerate(positions):
                matrix, inverted = blocks(block)
                if part.divided:
                    matrix, inverted = inverted.T, matrix.T
                product = channels[..., where].double() @ (inverted if inverse else matrix)
                channels[..., where] = product.to(mixed.dtype)
        if not bool(torch.isfinite(mixed).all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise EncryptError(
                f"{self._name}: overflows in {dtype} when its channels are mixed; use a smaller kappa and epsilon, or "
                "convert the checkpoint to float32"
            )
        return mixed


def mixings(sites: Iterable[Site], mechanisms: Sequence[Mapping[str, Blocks]]) -> Mapping[str, Mixing]:
    """What each tensor is mixed by, by its name; tensors that nothing mixes are left out.

    Args:
        sites: of the whole model.
        mechanisms: the matrices of sites by their names. The first is multiplied first: ``W_o A B``, ``B^-1 A^-1 W_v``.
    """
    found: dict[str, list[tuple[Part, int, Blocks]]] = defaultdict(list)
    for site in sites:
        chosen = [blocks[site.name] for blocks in mechanisms if site.name in blocks]
        if chosen:
            for part in site.parts:
                found[part.tensor].append((part, site.block, _product(chosen)))
    return {name: Mixing(name, parts) for name, parts in found.items()}


def _product(factors: Sequence[Blocks]) -> Blocks:
    def product(block: int) -> tuple[Tensor, Tensor]:
        matrix, inverse = factors[0](block)
        for factor in factors[1:]:
            next_matrix, next_inverse = factor(block)
            matrix, inverse = matrix @ next_matrix, next_inverse @ inverse
        return matrix, inverse

    return product


def _positions(part: Part, size: int) -> tuple[int, Tensor]:
    """Along which dimension the channels lie, and where: ``(blocks, copies, size)`` int64, a copy for every head that
    reads the block."""
    axis = max(range(part.channels.dim()), key=lambda dimension: part.channels.shape[dimension])
    channels = part.channels.flatten()
    order = channels.argsort(stable=True)[int((channels < 0).sum()) :]
    n_channels = int(channels.max()) + 1
    by_copy = order.view(n_channels, -1).T
    return axis, by_copy.reshape(len(by_copy), -1, size).transpose(0, 1)
