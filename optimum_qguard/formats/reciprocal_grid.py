"""The grid of quantizers that multiply by a reciprocal which their stored scale does not give back exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from optimum_qguard.formats.grid import Grid


@dataclass(frozen=True)
class ReciprocalGrid(Grid):
    """A grid whose quantizer multiplies by ``factor`` ``(n_blocks, 1)``; ``scale`` is its reciprocal, rounded."""

    factor: Tensor | None = None

    def __getitem__(self, blocks: slice) -> ReciprocalGrid:
        part = super().__getitem__(blocks)
        assert isinstance(part, ReciprocalGrid)
        return replace(part, factor=None if self.factor is None else self.factor[blocks])
