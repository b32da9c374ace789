"""Arguments of several verbs."""

from __future__ import annotations

from pathlib import Path


def comma_separated(given: str) -> tuple[str, ...]:
    """The names in it, each once."""
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def read_text(path: Path) -> str:
    """The text of a file that was named.

    Raises:
        CheckpointError: it cannot be read as UTF-8.
    """
    from optimum_qguard.checkpoint import CheckpointError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read as text ({reason}); name a UTF-8 file") from error
