"""What the weights themselves say: not finite, all alike, or the same twice."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.scan.finding import Finding, listed
from optimum_qguard.scan.subject import StoredTensor, Subject

_LAYER = re.compile(r"(?:^|\.)\d+\.")  # tied weights, which are the same twice by design, are in no layer
_BLOCK = 4096
_BLOCKS = 16
_SMALLEST = 256


@dataclass(frozen=True)
class Extent:
    """Of a piece of a tensor.

    Attributes:
        wrong: how many weights are NaN or infinite.
        low, high: the least and the greatest of the others; both 0 if some are wrong.
    """

    wrong: int
    low: float
    high: float


def extent(rows: Tensor) -> Extent:
    """Measure it: one pass, and more only if something is wrong."""
    low, high = (float(end) for end in torch.aminmax(rows))
    if abs(low) < float("inf") and abs(high) < float("inf"):  # aminmax passes NaN on, and NaN is less than nothing
        return Extent(0, low, high)
    return Extent(int(rows.numel() - torch.isfinite(rows).sum()), 0.0, 0.0)


def check_numbers(evidence: Mapping[str, Sequence[Extent]], subject: Subject) -> Iterator[Finding]:
    """Findings from every piece's extent, by tensor."""
    for tensor, pieces in evidence.items():
        wrong = sum(piece.wrong for piece in pieces)
        if wrong:
            message = f"{wrong:,} of the weights of {tensor} that were looked at are NaN or infinite."
            yield Finding(
                detector="integrity",
                severity="error",
                tensor=tensor,
                file=subject.tensors[tensor].file,
                message=message,
                statistic="weights that are not finite",
                value=wrong,
                expected=0,
            )
    zero = [tensor for tensor, pieces in evidence.items() if all(p == Extent(0, 0.0, 0.0) for p in pieces)]
    if zero:
        message = f"{len(zero):,} of the tensors hold nothing but zeros, as far as was looked: {listed(zero)}."
        yield Finding(detector="integrity", severity="note", message=message)
    varied = [
        subject.tensors[tensor]
        for tensor, pieces in evidence.items()
        if min(piece.low for piece in pieces) < max(piece.high for piece in pieces)
    ]
    for same in _duplicates(varied, subject):
        message = f"{len(same):,} tensors hold the same bytes wherever they were compared: {listed(same)}."
        yield Finding(detector="integrity", severity="note", message=message)


def _duplicates(tensors: Iterable[StoredTensor], subject: Subject) -> Iterator[list[str]]:
    """Ids of tensors of different layers that are the same; of local files only, for elsewhere a read is a request."""
    if subject.repository.local_folder is None:
        return
    groups: dict[object, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        if _LAYER.search(tensor.info.name) and tensor.info.n_elements >= _SMALLEST:
            groups[tensor.info.dtype, tensor.info.shape].append(tensor)
    for blocks in (1, _BLOCKS):
        closer: dict[object, list[StoredTensor]] = defaultdict(list)
        for key, group in groups.items():
            if len({tensor.info.name for tensor in group}) > 1:
                for tensor in group:
                    closer[key, _digest(tensor, subject, blocks)].append(tensor)
        groups = closer
    for group in groups.values():
        if len({tensor.info.name for tensor in group}) > 1:
            yield [tensor.id for tensor in group]


def _digest(tensor: StoredTensor, subject: Subject, blocks: int) -> bytes:
    """Of some blocks from the middle of equal parts of the tensor."""
    info = tensor.info
    digest = hashlib.blake2b(digest_size=16)
    for number in range(blocks):
        middle = info.n_bytes * (2 * number + 1) // (2 * blocks)
        start = max(min(middle, info.n_bytes - _BLOCK), 0)
        digest.update(subject.repository.read(tensor.file, info.offset + start, min(_BLOCK, info.n_bytes)))
    return digest.digest()
