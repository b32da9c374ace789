"""Buffers for the temporaries of a pass over a tensor in ranges."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_WEIGHTS = 1 << 18  # so many float32 are a megabyte: temporaries stay in the cache, calls are long enough


class Scratch:
    """Named buffers, reused from one range to the next: on the CPU a fresh tensor of a megabyte costs more in page
    faults than the arithmetic on it. A buffer's content is whatever its last user left."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._bytes = bytearray()

    def bytes(self, size: int) -> bytearray:
        """At least ``size`` bytes; the same ones each time."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return self._bytes

    def like(self, tensor: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of ``tensor``'s shape and device, uninitialized."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < tensor.numel() or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(tensor.numel(), dtype=dtype, device=tensor.device)
        return buffer[: tensor.numel()].view(tensor.shape)
