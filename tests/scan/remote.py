"""A repository that lies nowhere on this machine, as far as a scan can tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optimum_qguard.checkpoint.repository import FolderRepository, Repository, RepositoryFile


class Remote(Repository):
    """A folder's files.

    Args:
        sizes, digests: of files, that are claimed instead of the real size and no SHA-256.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int] | None = None, digests: Mapping[str, str] | None = None
    ) -> None:
        self._inner = FolderRepository(folder)
        sizes, digests = sizes or {}, digests or {}
        files = {
            name: RepositoryFile(name, sizes.get(name, file.size), digests.get(name))
            for name, file in self._inner.files.items()
        }
        super().__init__("org/model", "0123", files)

    def _read(self, file: str, start: int, length: int) -> bytes:
        return self._inner.read(file, start, length)
