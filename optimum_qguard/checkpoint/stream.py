"""Rewrites a checkpoint's files piece by piece: bytes in, bytes out, hashed on the way.

Pieces stay in the cache, so each byte is read from the disk and written to it once; memory is a few pieces for each
worker, whatever the size of the checkpoint. Files are not memory-mapped: mapped pages count as the process's memory.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from optimum_qguard.checkpoint.atomic import write_all, writing
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.flush import flushing
from optimum_qguard.checkpoint.header import TensorInfo
from optimum_qguard.checkpoint.reader import CheckpointReader

PIECE_BYTES = 1 << 20


class Rewrite(Protocol):
    """What happens to one tensor."""

    whole: bool
    """Whether it needs the tensor in one piece."""

    def piece(self, rows: Tensor, start: int) -> Tensor:
        """Rows of the tensor from ``start`` on, which may be changed in place; what to write, of the same shape and
        dtype."""

    def done(self) -> None:
        """Called after the last piece."""


def rewrite_shards(
    reader: CheckpointReader,
    folder: Path,
    rewrite: Callable[[TensorInfo], Rewrite],
    *,
    workers: int = 1,
    progress: Callable[[TensorInfo], None] | None = None,
) -> Mapping[str, str]:
    """Write all of a checkpoint's safetensors files into ``folder`` with their tensors rewritten.

    Headers are copied, so where nothing changes files stay byte-identical. What is written is on the disk, flushed,
    when this returns. torch's threads are shared out among the workers, which keep the cores busy by themselves; until
    they are done, a thread that somebody else starts gets a worker's share as well.

    Args:
        reader: the input.
        folder: exists, and has no files of these names.
        rewrite: what to do with a tensor; called in whichever thread has its file.
        workers: how many files are written at the same time.
        progress: called after each tensor, by any worker.

    Returns:
        SHA-256 of each file that was written, in hexadecimal.

    Raises:
        CheckpointError: a file cannot be read or written, or there are no workers.
    """
    if workers < 1:
        raise CheckpointError(f"workers is a number from 1 on, not {workers}")
    stopped = threading.Event()

    def write(shard: str) -> str:
        return _write_shard(reader, shard, folder / shard, rewrite, progress, stopped)

    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(workers, "qguard-shard", torch.set_num_threads, (share,)) as pool:
            futures = {shard: pool.submit(write, shard) for shard in reader.shards}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                return {shard: future.result() for shard, future in futures.items() if future in done}
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        # A worker's number is its own, but also what torch gives to threads that start later.
        torch.set_num_threads(threads)


def _write_shard(
    reader: CheckpointReader,
    shard: str,
    path: Path,
    rewrite: Callable[[TensorInfo], Rewrite],
    progress: Callable[[TensorInfo], None] | None,
    stopped: threading.Event,
) -> str:
    header, source_path = reader.headers[shard], reader.file(shard)
    digest = hashlib.sha256(header.raw)
    buffer = bytearray(PIECE_BYTES)
    with writing(path):
        out = path.open("xb", buffering=0)
    with out, source_path.open("rb", buffering=0) as source, flushing(out, path) as flush:
        source.seek(len(header.raw))
        write_all(out, memoryview(header.raw), path)
        for info in header.tensors:
            change = rewrite(info)
            for start, shape in _pieces(info, change.whole):
                if stopped.is_set():  # by Ctrl-C, or because another file failed
                    raise CancelledError
                size = math.prod(shape) * info.dtype.itemsize
                if len(buffer) < size:
                    buffer = bytearray(size)
                content = memoryview(buffer)[:size]
                _read(source, content, source_path)
                rows = torch.frombuffer(content, dtype=info.dtype).view(shape)
                written = change.piece(rows, start)
                if written is not rows:
                    content = written.contiguous().flatten().view(torch.uint8).numpy().data
                digest.update(content)
                write_all(out, content, path)
                flush.written(len(content))
            change.done()
            if progress is not None:
                progress(info)
    return digest.hexdigest()


def _pieces(info: TensorInfo, whole: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """First row and shape of each piece."""
    if not info.shape or whole:
        if info.n_bytes:
            yield 0, info.shape
        return
    rows, *rest = info.shape
    step = max(1, PIECE_BYTES * rows // max(info.n_bytes, 1))
    for start in range(0, rows if info.n_bytes else 0, step):
        yield start, (min(step, rows - start), *rest)


def _read(file: FileIO, into: memoryview, path: Path) -> None:
    while into:
        try:
            count = file.readinto(into)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not count:
            raise CheckpointError(f"{path}: became shorter while it was read; do not change it meanwhile")
        into = into[count:]
