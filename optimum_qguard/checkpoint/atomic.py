"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from optimum_qguard.checkpoint.errors import CheckpointError


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name in its folder, flush it to the disk and rename it.

    Text is written as UTF-8 with its line ends as they are. An existing file keeps its permissions; an existing link
    is replaced, not written through.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission, no such folder).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            with partial.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_all(file: FileIO, content: memoryview, path: Path) -> None:
    """Write all of ``content`` to an unbuffered file.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(path):
        while content:
            content = content[file.write(content) :]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a failed write of ``path`` into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
