"""The hidden folder beside the output in which a run keeps its checkpoints, so that it can be killed and go on.

The trainer writes a checkpoint's files one after the other, and its state last: a checkpoint is complete if that can be
read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.checkpoint.output import claim_folder
from optimum_qguard.repair.errors import RepairError

_SETTINGS_FILE = "settings.json"
_STATE_FILE = "trainer_state.json"
_CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_AGAIN = "begin again without --resume and with --overwrite"


class Workspace:
    """An open workspace.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the last complete checkpoint."""
        found = [(step, path) for path in self.folder.glob("checkpoint-*") if (step := _step(path)) is not None]
        return max(found, default=None)

    @property
    def size(self) -> int:
        """Bytes of the files in it."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Check that a run that goes on is the one that was begun, and write down what it is.

        Raises:
            RepairError: it was begun with other settings, or what it left is damaged.
            CheckpointError: it cannot be written.
        """
        path = self.folder / _SETTINGS_FILE
        if resume and self.checkpoint is not None:
            before = _settings(path)
            _check_files(self.checkpoint[1])
            for name, value in settings.items():
                if before.get(name) != value:
                    raise RepairError(
                        f"the run in {self.folder} was begun with another {name} ({before.get(name)}, now {value}); "
                        f"give the same, or {_AGAIN}"
                    )
        else:
            self._clear()
        atomic_write(path, json.dumps(dict(settings)))

    def history(self) -> list[dict[str, Any]]:
        """What the last complete checkpoint's run had logged by then."""
        if self.checkpoint is None:
            return []
        state = json.loads((self.checkpoint[1] / _STATE_FILE).read_text(encoding="utf-8"))
        logged: list[dict[str, Any]] = state["log_history"]
        return logged

    def drop_incomplete(self) -> None:
        """Delete checkpoints that were not written to their end."""
        for path in self.folder.glob("checkpoint-*"):
            if _step(path) is None:
                shutil.rmtree(path, ignore_errors=True)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def workspace(out: str | Path, *, resume: bool, overwrite: bool) -> Iterator[Workspace]:
    """Open it, for this run only. Afterwards it is deleted, but after an error kept if there is a checkpoint in it.

    Args:
        out: the output folder, beside which it is.
        resume: go on from the last checkpoint, if there is one.
        overwrite: without ``resume``: what an earlier run left may be deleted.

    Raises:
        RepairError: an earlier run left a checkpoint, and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: another run is writing to ``out``, or the folder cannot be made.
    """
    final = Path(out).expanduser().resolve()
    folder = final.with_name(f".{final.name}.repair")
    missing = [parent for parent in final.parents if not parent.exists()]
    claim = claim_folder(folder, out)
    work = Workspace(folder)
    kept = False
    try:
        work.drop_incomplete()
        left = work.checkpoint
        if left is not None and not (resume or overwrite):
            raise RepairError(
                f"{folder}: a run that did not end left its checkpoint of step {left[0]}; go on from it with --resume, "
                "or begin again with --overwrite"
            )
        yield work
    except BaseException:
        work.drop_incomplete()
        kept = work.checkpoint is not None
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(claim)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _step(checkpoint: Path) -> int | None:
    """The step of a complete checkpoint."""
    try:
        step: int = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise RepairError(f"{path}: is damaged, so nothing can go on from there; {_AGAIN}")
    return settings


def _check_files(checkpoint: Path) -> None:
    """Raise `RepairError` if one of a checkpoint's files lacks its end, as after a power failure: the trainer would
    say neither which nor what to do, and would go on without an optimizer's state that is missing."""
    for name in _CHECKPOINT_FILES:
        path = checkpoint / name
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    whole = True
            else:
                whole = zipfile.is_zipfile(path)
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            raise RepairError(f"{path}: is missing or damaged, so nothing can go on from there; {_AGAIN}")
