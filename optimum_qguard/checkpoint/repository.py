"""What is in a repository, and bytes of it: a folder, one file, or a Hub repository at one commit.

Nothing is downloaded but the bytes that are asked for, and nothing is believed of them: a repository may hold anything.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from optimum_qguard.checkpoint.connection import HubConnection
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import looks_like_hub_id, split_hub_id
from optimum_qguard.checkpoint.json_object import parse_object
from optimum_qguard.checkpoint.local import local_path

_MOST_FILES = 100_000
_MOST_AT_ONCE = 1 << 30
LARGEST_JSON = 16 << 20  # the index of 100,000 tensors has less


@dataclass(frozen=True)
class RepositoryFile:
    """One file.

    Attributes:
        name: its path in the repository, with ``/``.
        size: in bytes.
        sha256: of its content, in hexadecimal, where the Hub says it (files in large file storage).
    """

    name: str
    size: int
    sha256: str | None = None


class Repository(ABC):
    """Read by several threads at once.

    Attributes:
        name: as it was named, without a revision.
        revision: the commit, of a Hub repository.
        files: by name, sorted.
    """

    def __init__(self, name: str, revision: str | None, files: Mapping[str, RepositoryFile]) -> None:
        self.name = name
        self.revision = revision
        self.files: Mapping[str, RepositoryFile] = MappingProxyType(dict(sorted(files.items())))
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._closed = False

    @property
    def bytes_read(self) -> int:
        """How many bytes have been read of it so far."""
        return self._bytes_read

    def read(self, file: str, start: int = 0, length: int | None = None) -> bytes:
        """Exactly ``length`` bytes of a file from ``start`` on, or what there is up to its end.

        Raises:
            CheckpointError: no such file, or it cannot be read, or has changed.
        """
        if self._closed:
            raise CheckpointError(f"{self.name}: closed")
        if file not in self.files:
            raise CheckpointError(f"{self.name}: has no file {file}")
        rest = max(self.files[file].size - start, 0)
        content = self._read(file, start, rest if length is None else min(length, rest))
        self.count(len(content))
        return content

    def read_buffer(self, file: str, start: int, length: int) -> bytearray:
        """Exactly ``length`` bytes of a file from ``start`` on, to be written to.

        Raises:
            CheckpointError: as `read`; also if the file ends before.
        """
        if self._closed:
            raise CheckpointError(f"{self.name}: closed")
        if file not in self.files:
            raise CheckpointError(f"{self.name}: has no file {file}")
        if start + length > self.files[file].size:
            raise CheckpointError(f"{self.name}/{file}: ends before byte {start + length}")
        content = self._read_buffer(file, start, length)
        self.count(length)
        return content

    def count(self, n_bytes: int) -> None:
        """Add what another process has read of the same repository to `bytes_read`."""
        with self._lock:
            self._bytes_read += n_bytes

    @abstractmethod
    def _read(self, file: str, start: int, length: int) -> bytes:
        """Exactly those bytes, which lie within the file."""

    def _read_buffer(self, file: str, start: int, length: int) -> bytearray:
        return bytearray(self._read(file, start, length))

    @property
    def local_folder(self) -> Path | None:
        """Where it lies on this machine; ``None`` if it does not."""
        return None

    def close(self) -> None:
        """Give back connections; nothing can be read any more."""
        self._closed = True


class FolderRepository(Repository):
    """A folder, or one file in it, on this machine. Hidden files and folders are left out.

    Links may lead anywhere in the folder and, in the Hub's cache, to its blobs; others are not followed but listed in
    `stray_links`.
    """

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` if it cannot be listed."""
        self._folder = path if path.is_dir() else path.parent
        self.stray_links: list[str] = []
        root = self._folder.resolve()
        roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
        files: dict[str, RepositoryFile] = {}
        try:
            for found in _walk(path) if path.is_dir() else [path]:
                name = found.relative_to(self._folder).as_posix()
                if path.is_dir() and not _leads_into(found, roots):
                    self.stray_links.append(name)
                elif found.is_file():
                    files[name] = RepositoryFile(name, found.stat().st_size)
                if len(files) > _MOST_FILES:
                    raise CheckpointError(f"{path}: has more than {_MOST_FILES:,} files; name the model's own folder")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        super().__init__(str(path), None, files)
        self._last: tuple[str, io.FileIO] | None = None

    def _read(self, file: str, start: int, length: int) -> bytes:
        return bytes(self._read_buffer(file, start, length))

    def _read_buffer(self, file: str, start: int, length: int) -> bytearray:
        content = bytearray(length)
        rest = memoryview(content)
        try:
            stream = self._opened(file)
            while rest:
                count = os.preadv(stream.fileno(), [rest[:_MOST_AT_ONCE]], start + length - len(rest))
                if count == 0:
                    raise CheckpointError(f"{self._folder / file}: became shorter while it was read")
                rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{self._folder / file}: cannot be read: {error.strerror or error}") from error
        return content

    def _opened(self, file: str) -> io.FileIO:
        """The file, kept open until another one is read: a thread that still reads this one keeps it open too."""
        last = self._last
        if last is None or last[0] != file:
            last = self._last = file, io.FileIO(self._folder / file)
        return last[1]

    def close(self) -> None:
        super().close()
        self._last = None

    @property
    def local_folder(self) -> Path:
        return self._folder


class HubRepository(Repository):
    """A Hub repository at one commit, read by range requests: nothing but what is asked for is downloaded.

    ``HF_TOKEN`` and the other settings of huggingface_hub count.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        """Find the commit and list its files.

        Raises:
            CheckpointError: no such repository or revision, no access, no connection, offline mode; more files than a
                model has, or names that lead out of a folder.
        """
        self._connection = HubConnection(repo_id, revision)
        commit = self._connection.commit
        files: dict[str, RepositoryFile] = {}
        for entry in self._connection.entries():
            name, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
            if entry.get("type") != "file":
                continue
            sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
            if not isinstance(name, str) or type(size) is not int or size < 0:
                raise CheckpointError(f"{repo_id}: its list of files makes no sense; do not use this repository")
            files[check_name(name)] = RepositoryFile(name, size, sha256 if isinstance(sha256, str) else None)
            if len(files) > _MOST_FILES:
                raise CheckpointError(f"{repo_id}: has more than {_MOST_FILES:,} files, which no model needs")
        super().__init__(repo_id, commit, files)

    def _read(self, file: str, start: int, length: int) -> bytes:
        entry = self.files[file]
        content = self._connection.read(file, start, length, entry.size)
        if length == entry.size and entry.sha256 and hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointError(f"{self.name}/{file}: has another SHA-256 than the Hub says; do not use it")
        return content


def open_repository(model: str | Path, *, revision: str | None = None) -> Repository:
    """Open a folder, a file, or a Hub repository (``org/name``, optionally ``org/name@revision``).

    Raises:
        CheckpointError: there is no such folder, file or repository, or it cannot be listed.
    """
    path = local_path(model, revision)
    if path is not None:
        return FolderRepository(path)
    if isinstance(model, str) and looks_like_hub_id(model):
        return HubRepository(*split_hub_id(model, revision))
    raise CheckpointError(f"{model}: no such folder or file")


def read_object(repository: Repository, file: str) -> dict[str, Any]:
    """A JSON file of a repository.

    Raises:
        CheckpointError: it is none, or cannot be read.
    """
    try:
        if repository.files[file].size > LARGEST_JSON:
            raise ValueError("it is too long")
        return parse_object(repository.read(file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error


def check_name(name: str) -> str:
    """The path of a file in a repository, if it cannot lead out of one.

    Raises:
        CheckpointError: it can.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable() or path.as_posix() != name:
        raise CheckpointError(f"{name!r:.200} is no name of a file in a repository; do not use this repository")
    return name


def _walk(folder: Path) -> list[Path]:
    """All files, and links to folders, which are not followed."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent) / name for name in folders if (Path(parent) / name).is_symlink()]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return found


def _raise(error: OSError) -> None:
    raise error  # what cannot be listed is not silently left out


def _leads_into(path: Path, roots: list[Path]) -> bool:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return any(target.is_relative_to(root) for root in roots)
