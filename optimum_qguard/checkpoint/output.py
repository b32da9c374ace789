"""An output folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from optimum_qguard.checkpoint.atomic import writing
from optimum_qguard.checkpoint.description import RECORDS
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.reader import CheckpointReader, is_weight_file


@contextlib.contextmanager
def output_folder(
    out: str | Path, source: Path, *, overwrite: bool = False, flushed: Collection[str] = ()
) -> Iterator[Path]:
    """An empty temporary folder beside ``out`` that takes its place when the block ends without an error.

    Its files are flushed to the disk before they get their final names. After an error nothing is left behind and
    ``out`` is as it was. With ``overwrite``, weight files in ``out`` that are not part of the new checkpoint are
    deleted, since a loader might prefer them, and so are `RECORDS`, which are about other weights; other files stay.

    Args:
        source: the input's folder, which must not be written to.
        flushed: files that the block flushes to the disk by itself, which is not done once more.

    Raises:
        CheckpointError: see `check_output`; or no space left; or another run is writing to ``out``.
    """
    check_output(out, source, overwrite=overwrite)
    final = Path(out).expanduser().resolve()
    missing = [parent for parent in final.parents if not parent.exists()]
    staging = final.with_name(f".{final.name}.partial")
    claim = claim_folder(staging, out)
    try:
        _empty(staging)
        yield staging
        _publish(staging, final, flushed)
    except Exception as error:
        if _is_no_space(error):
            raise CheckpointError(
                f"{out}: no space left on the disk; free some, or name a folder on another disk"
            ) from error
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(claim)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def check_output(out: str | Path, source: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        CheckpointError: ``out`` is a file, is not empty (without ``overwrite``), or is the input or in it.
    """
    try:
        final = Path(out).expanduser()
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{out}: is a file; name a folder to write to")
        if final.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{out}: is the input's folder or lies in it; name another folder to write to")
        if not overwrite and final.is_dir() and any(final.iterdir()):
            raise CheckpointError(f"{out}: exists and is not empty; name another folder, or give --overwrite")
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
        raise CheckpointError(f"{out}: cannot be written to ({reason}); name another folder") from error


def make_folder(folder: Path) -> None:
    """Make a folder that may exist already.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error


def copy_other_files(reader: CheckpointReader, folder: Path, *, leave: Sequence[str] = ()) -> None:
    """Copy what lies beside a checkpoint's weights (tokenizer, model card and so on), but for what is named.

    Raises:
        CheckpointError: a file cannot be written.
    """
    for name in reader.other_files:
        if name.as_posix() in leave:
            continue
        target = folder / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reader.file(name), target)


def check_space(out: str | Path, needed: int) -> None:
    """Raise `CheckpointError` if the disk of ``out`` has fewer than ``needed`` bytes free."""
    final = Path(out).expanduser().absolute()
    existing = next(folder for folder in (final, *final.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{out}: no space: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free; "
            "free some, or name a folder on another disk"
        )


def claim_folder(folder: Path, out: str | Path) -> int:
    """Make a folder, which may exist already, for this run only.

    Args:
        out: the output that it is for, which errors name.

    Returns:
        A descriptor; whoever closes it, or is killed, gives the folder up.

    Raises:
        CheckpointError: it cannot be made, or another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A link that somebody else put there would have what it leads to emptied.
        claim = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if folder.is_symlink():
            raise CheckpointError(f"{out}: {folder} is a link, and is not followed; delete it") from error
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(claim)
        raise CheckpointError(f"{out}: another run is writing to it; wait for that, or name another folder") from error
    return claim


def _empty(folder: Path) -> None:
    """Delete what a killed run left."""
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _publish(staging: Path, final: Path, flushed: Collection[str]) -> None:
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    for name in files:
        if name.as_posix() in flushed:
            continue
        with (staging / name).open("r+b") as file:
            os.fsync(file.fileno())
    if not final.exists() or not any(final.iterdir()):
        staging.replace(final)
        return
    for stale in final.iterdir():
        if (is_weight_file(stale) or stale.name in RECORDS) and Path(stale.name) not in files:
            stale.unlink()
    for name in files:
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(final / name)


def _is_no_space(error: BaseException) -> bool:
    # safetensors writes in Rust and reports the system's error as text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
