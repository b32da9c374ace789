"""Files flushed to the disk while they are written."""

import errno
import os
from pathlib import Path

import pytest

from optimum_qguard.checkpoint import CheckpointError, flush
from optimum_qguard.checkpoint.flush import flushing


def test_all_of_it_is_written_and_flushed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(flush, "FLUSH_BYTES", 10)
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    path = tmp_path / "file"
    with path.open("xb", buffering=0) as file, flushing(file, path) as flushed:
        for _ in range(8):
            flushed.written(file.write(b"12345"))
    assert len(sizes) >= 2
    assert sizes[-1] == 40


@pytest.mark.parametrize("failing", [0, 1])
def test_a_flush_that_fails_is_an_error_though_the_next_one_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Linux reports what it could not write once, to whoever flushes next."""
    calls = iter(range(100))

    def fsync(_: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(flush, "FLUSH_BYTES", 10)
    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "file"
    with (
        path.open("xb", buffering=0) as file,
        pytest.raises(CheckpointError, match=f"{path}: cannot be written: Input/output error"),
        flushing(file, path) as flushed,
    ):
        flushed.written(file.write(b"1234567890"))
