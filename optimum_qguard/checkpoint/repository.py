"""What is in a repository, and bytes of it: a folder, one file, or a Hub repository at one commit.

Nothing is downloaded but the bytes that are asked for, and nothing is believed of them: a repository may hold anything.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import looks_like_hub_id

_MOST_FILES = 100_000


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

    @property
    def bytes_read(self) -> int:
        """How many bytes `read` has given so far."""
        return self._bytes_read

    def read(self, file: str, start: int = 0, length: int | None = None) -> bytes:
        """Exactly ``length`` bytes of a file from ``start`` on, or what there is up to its end.

        Raises:
            CheckpointError: no such file, or it cannot be read, or has changed.
        """
        if file not in self.files:
            raise CheckpointError(f"{self.name}: has no file {file}")
        rest = max(self.files[file].size - start, 0)
        content = self._read(file, start, rest if length is None else min(length, rest))
        with self._lock:
            self._bytes_read += len(content)
        return content

    @abstractmethod
    def _read(self, file: str, start: int, length: int) -> bytes:
        """Exactly those bytes, which lie within the file."""

    @property
    def local_folder(self) -> Path | None:
        """Where it lies on this machine; ``None`` if it does not."""
        return None

    def close(self) -> None:
        """Give back connections."""


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

    def _read(self, file: str, start: int, length: int) -> bytes:
        try:
            with (self._folder / file).open("rb") as stream:
                stream.seek(start)
                content = stream.read(length)
        except OSError as error:
            raise CheckpointError(f"{self._folder / file}: cannot be read: {error.strerror or error}") from error
        if len(content) != length:
            raise CheckpointError(f"{self._folder / file}: became shorter while it was read")
        return content

    @property
    def local_folder(self) -> Path:
        return self._folder


def open_repository(model: str | Path, *, revision: str | None = None) -> Repository:
    """Open a folder, a file, or a Hub repository (``org/name``, optionally ``org/name@revision``).

    Raises:
        CheckpointError: there is no such folder, file or repository, or it cannot be listed.
    """
    path = Path(model).expanduser()
    if path.exists():
        return FolderRepository(path)
    if isinstance(model, str) and looks_like_hub_id(model):
        raise NotImplementedError(revision)
    raise CheckpointError(f"{path}: no such folder or file")


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
