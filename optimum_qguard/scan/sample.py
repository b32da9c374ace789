"""Which weights of a tensor are looked at, and reading just those.

A quick scan reads a few runs of whole rows of each tensor, at places that the operating system's randomness chooses, so
that nobody can leave those alone. Runs begin and end where quantization blocks do.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qguard.checkpoint.repository import Repository
from optimum_qguard.scan.subject import ALIGNMENT, StoredTensor

SHARE = 1 / 100
"""Of a tensor's weights, that a quick scan looks at."""

LEAST_WEIGHTS = 1 << 14
"""That a quick scan looks at in each tensor, if it has so many."""

_PIECE_BYTES = 64 << 20
_RUNS = 4
_RUNS_REMOTE = 1  # every run is a request


@dataclass(frozen=True)
class Sample:
    """A piece of a tensor, as a quantizer sees it.

    Attributes:
        tensor: `StoredTensor.id`; ``file``: that holds it.
        shape: of the whole tensor, ``(…, out_features, in_features)``.
        rows: ``(n_rows, in_features)`` in the dtype that is stored, or ``(1, n)`` for a vector.
        first_rows: for each run of consecutive rows in ``rows``, which row of the whole tensor (its leading dimensions
            flattened) it begins with; the runs are equally long but for the last.
        complete: whether ``rows`` is the whole tensor.
        quick: whether it was chosen for a quick scan, so that a costly detector may look at a part of it.
    """

    tensor: str
    file: str
    shape: tuple[int, ...]
    rows: Tensor
    first_rows: tuple[int, ...]
    complete: bool
    quick: bool = False


def samples(repository: Repository, tensor: StoredTensor, seed: int, *, full: bool) -> Iterator[Sample]:
    """The pieces of a tensor that are looked at; none of one without elements.

    Args:
        seed: decides with the tensor's name which rows.
        full: whether all rows.

    Raises:
        CheckpointError: the file cannot be read.
    """
    info = tensor.info
    if info.n_elements == 0:
        return
    if len(info.shape) < 2:
        rows = _read(repository, tensor, 0, info.n_elements).view(1, -1)
        yield Sample(tensor.id, tensor.file, info.shape, rows, (0,), complete=True)
        return
    if tensor.transposed:
        yield from _transposed(repository, tensor, seed, full=full)
        return
    length = info.shape[-1]
    n_rows = info.n_elements // length
    remote = repository.local_folder is None
    chosen = [range(n_rows)] if full else runs(n_rows, length, _seed(seed, tensor.id), remote=remote)
    if full:
        step = max(_aligned(length), _PIECE_BYTES // (length * info.dtype.itemsize))
        step -= step % _aligned(length)
        for first in range(0, n_rows, step):
            last = min(first + step, n_rows)
            rows = _read(repository, tensor, first * length, last * length).view(-1, length)
            yield Sample(tensor.id, tensor.file, info.shape, rows, (first,), complete=last - first == n_rows)
        return
    parts = [_read(repository, tensor, run.start * length, run.stop * length).view(-1, length) for run in chosen]
    complete = sum(map(len, chosen)) == n_rows
    firsts = tuple(run.start for run in chosen)
    yield Sample(tensor.id, tensor.file, info.shape, torch.cat(parts), firsts, complete=complete, quick=True)


def sampled_runs(tensor: StoredTensor, seed: int, *, remote: bool) -> list[range]:
    """Which rows of a tensor a quick scan looks at; the same of any tensor of this name and shape.

    Args:
        remote: whether reading takes requests.
    """
    n_rows, length = _as_matrix(tensor)
    return runs(n_rows, length, _seed(seed, tensor.info.name), remote=remote)


def read_runs(repository: Repository, tensor: StoredTensor, chosen: Sequence[range]) -> Tensor:
    """Those rows, one after the other, as a quantizer sees them: ``(n, in_features)``.

    Raises:
        CheckpointError: the file cannot be read.
    """
    n_rows, length = _as_matrix(tensor)
    if tensor.transposed:
        whole = _read(repository, tensor, 0, tensor.info.n_elements).view(length, n_rows).T
        return torch.cat([whole[run.start : run.stop] for run in chosen])
    parts = [_read(repository, tensor, run.start * length, run.stop * length).view(-1, length) for run in chosen]
    return torch.cat(parts)


def _as_matrix(tensor: StoredTensor) -> tuple[int, int]:
    """How many rows a quantizer sees in it, and how long they are; a vector is one row."""
    if tensor.transposed:
        length, n_rows = tensor.info.shape
        return n_rows, length
    length = tensor.info.shape[-1] if len(tensor.info.shape) > 1 else tensor.info.n_elements
    return tensor.info.n_elements // length, length


def runs(n_rows: int, length: int, seed: int, *, remote: bool) -> list[range]:
    """Runs of rows, sorted and apart, that make about `SHARE` of ``n_rows`` rows of ``length`` weights.

    One in each equal part of the tensor, equally long; but rows after the last whole block, fewer than 256, go with a
    run that ends there.
    """
    unit = _aligned(length)
    units = n_rows // unit
    wanted = math.ceil(max(LEAST_WEIGHTS, SHARE * n_rows * length) / (unit * length))
    if wanted >= units:
        return [range(n_rows)]
    count = min(_RUNS_REMOTE if remote else _RUNS, wanted)
    each = wanted // count
    generator = random.Random(seed)  # noqa: S311  the seed is the operating system's
    found = []
    for part in range(count):
        first, last = part * units // count, (part + 1) * units // count - each
        # As often as the part's middle its ends would be beyond: so no row is less likely than another.
        start = min(max(generator.randrange(first - each + 1, last + each), first), last)
        stop = start + each
        found.append(range(start * unit, n_rows if stop == units else stop * unit))
    return found


def _transposed(repository: Repository, tensor: StoredTensor, seed: int, *, full: bool) -> Iterator[Sample]:
    """A stored row has one weight of every output, so the tensor is read whole."""
    info = tensor.info
    length, n_rows = info.shape
    whole = _read(repository, tensor, 0, info.n_elements).view(length, n_rows).T
    shape = (n_rows, length)
    if full:
        yield Sample(tensor.id, tensor.file, shape, whole.contiguous(), (0,), complete=True)
        return
    chosen = runs(n_rows, length, _seed(seed, tensor.id), remote=False)
    rows = torch.cat([whole[run.start : run.stop] for run in chosen]).contiguous()
    firsts = tuple(run.start for run in chosen)
    yield Sample(tensor.id, tensor.file, shape, rows, firsts, complete=len(rows) == n_rows, quick=True)


def _aligned(length: int) -> int:
    """The least number of rows of ``length`` weights that a whole number of blocks fits."""
    return ALIGNMENT // math.gcd(length, ALIGNMENT)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode(errors="surrogatepass")).digest(), "big")


def _read(repository: Repository, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the flat tensor, in a buffer of their own."""
    size = tensor.info.dtype.itemsize
    content = repository.read_buffer(tensor.file, tensor.info.offset + start * size, (stop - start) * size)
    return torch.frombuffer(content, dtype=tensor.info.dtype)
