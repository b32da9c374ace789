"""What a model's name means on this machine."""

from __future__ import annotations

from pathlib import Path

from optimum_qguard.checkpoint.errors import CheckpointError


def local_path(model: str | Path, revision: str | None = None) -> Path | None:
    """The folder or file that ``model`` names; ``None`` if there is none.

    Raises:
        CheckpointError: the name is empty; there is such a folder or file, and a revision is asked for, which only
            repositories have; it cannot be told (no permission, a name that is too long, the home of a user that there
            is not).
    """
    if model == "":  # a variable that is not set, and not the working directory
        raise CheckpointError("the model's name is empty; name a folder or a repository")
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
        raise CheckpointError(f"{model}: cannot be looked for ({reason}); name a folder or a repository") from error
    if exists and revision is not None:
        raise CheckpointError(f"{model}: is on this machine, where there is no revision {revision}; leave that out")
    return path if exists else None
