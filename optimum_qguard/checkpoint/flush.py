"""Flushes a file to the disk while it is written, so that little is left to wait for at its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from optimum_qguard.checkpoint.atomic import writing

FLUSH_BYTES = 64 << 20


class Flush:
    """Flushes a file in a thread of its own, whenever enough was written and the flush before is done."""

    def __init__(self, file: FileIO, path: Path, pool: ThreadPoolExecutor) -> None:
        self._file = file
        self._path = path
        self._pool = pool
        self._flush: Future[None] | None = None
        self._waiting = 0

    def written(self, n_bytes: int) -> None:
        """So much more was written.

        Raises:
            CheckpointError: an earlier flush failed. The system says so once only.
        """
        self._waiting += n_bytes
        if self._waiting >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait()
            self._flush = self._pool.submit(os.fsync, self._file.fileno())
            self._waiting = 0

    def finish(self) -> None:
        """Flush what is left, and wait for it.

        Raises:
            CheckpointError: this or an earlier flush failed.
        """
        self._wait()
        with writing(self._path):
            os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._flush is not None:
            with writing(self._path):
                self._flush.result()


@contextlib.contextmanager
def flushing(file: FileIO, path: Path) -> Iterator[Flush]:
    """An open file that is on the disk when the block ends without an error.

    Args:
        file: open for writing, unbuffered.
        path: its name, for errors.

    Raises:
        CheckpointError: it cannot be written.
    """
    with ThreadPoolExecutor(1, "qguard-flush") as pool:
        flush = Flush(file, path, pool)
        yield flush
        flush.finish()
