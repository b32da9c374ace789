"""One tensor of a checkpoint as a map of its own bytes: what reading again and again costs least."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from optimum_qguard.checkpoint.reader import CheckpointReader


def map_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """One tensor, memory-mapped; its pages are given back with it.

    `CheckpointReader.read` does the same for every dtype, but has the header parsed again each time, which for a tensor
    of half a million weights takes longer than reading it.

    Args:
        name: of a tensor whose elements have whole bytes.

    Returns:
        As it is stored; writing into it changes this process's copy only.
    """
    info = reader.tensors[name]
    if info.n_bytes == 0 or info.offset % info.dtype.itemsize:
        return reader.read(name)
    lead = info.offset % mmap.ALLOCATIONGRANULARITY
    with reader.file(info.shard).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), lead + info.n_bytes, access=mmap.ACCESS_COPY, offset=info.offset - lead)
    return torch.frombuffer(mapped, dtype=info.dtype, count=info.n_elements, offset=lead).view(info.shape)
