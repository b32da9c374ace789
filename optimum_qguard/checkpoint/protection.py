"""Whether a checkpoint says of itself that it is protected against quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import commit_of
from optimum_qguard.checkpoint.json_object import parse_object

MANIFEST_FILE = "qguard.json"
PROTECTED = "encrypted"
PROTECTED_TAG = "quantization-protected"
GUARDED_TAG = "quantization-guarded"
"""Of model cards."""
UNLOCKED = "_qguard_unlocked"
"""Attribute of a model that is being loaded with its key."""


def protection(file: str | Path) -> dict[str, Any] | None:
    """The manifest of a protected checkpoint; ``None`` if there is none, or it is a report of another kind.

    Args:
        file: where `MANIFEST_FILE` would be.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        content = parse_object(Path(file).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    return content if content.get("kind") == PROTECTED else None


def protection_of(model: Any, files: Any) -> tuple[Path, dict[str, Any]] | None:
    """Likewise for a model that transformers is loading: where the manifest is, and what it says.

    Args:
        model: the skeleton; its name is a folder or a Hub id.
        files: the checkpoint's files on this machine.
    """
    from transformers.utils.hub import cached_file

    if not files:
        return None
    found = Path(str(files[0])).parent / MANIFEST_FILE
    revision = commit_of(files)
    if not found.exists() and revision is not None:
        cached = cached_file(
            model.name_or_path,
            MANIFEST_FILE,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = found if cached is None else Path(cached)
    manifest = protection(found)
    return None if manifest is None else (found, manifest)
