"""What reports call the model that was read."""

from __future__ import annotations

from pathlib import Path

from optimum_qguard.checkpoint.reader import CheckpointReader


def name_and_revision(model: str | Path, reader: CheckpointReader) -> tuple[str, str | None]:
    """A folder's path, or a Hub id and the commit that was read."""
    if Path(model).expanduser().exists():
        return str(model), None
    return str(model).partition("@")[0], reader.folder.name
