"""Writes a checkpoint out in the layout of another one, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from optimum_qguard.checkpoint.atomic import write_all, writing
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import TensorInfo
from optimum_qguard.checkpoint.output import copy_other_files
from optimum_qguard.checkpoint.reader import INDEX_FILE, CheckpointReader, is_weight_file

# Everything is written here, inside the output folder, and renamed when it is complete.
_STAGING = ".qguard-partial"


def transform_checkpoint(
    reader: CheckpointReader,
    out: str | Path,
    fn: Callable[[str, Tensor], Tensor],
    *,
    overwrite: bool = False,
    progress: Callable[[TensorInfo], None] | None = None,
) -> None:
    """Write ``fn(name, tensor)`` for every tensor, with the same files, names, shapes and dtypes.

    Headers are copied, so where ``fn`` changes nothing the output is byte-identical to the input. Configuration,
    tokenizer and the other files are copied along. Nothing appears under its final name before everything is written;
    after an error nothing is left behind. Peak memory is one tensor and what ``fn`` needs.

    Args:
        reader: the input.
        out: the output folder; made if missing.
        fn: gets each tensor once, in the order in which they are stored; returns one of the same shape and dtype, on
            any device.
        overwrite: replace what is in ``out``: weight files that are not part of the new checkpoint are deleted, since
            a loader might prefer them; other files stay.
        progress: called after each tensor.

    Raises:
        CheckpointError: ``out`` is a file, is not empty (without ``overwrite``), or is the input or in it; not enough
            space; a write failed; ``fn`` returned another shape or dtype.
    """
    out = Path(out)
    _check_output(reader, out, overwrite)
    created = not out.exists()
    staging = out / _STAGING
    try:
        with writing(out):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        for shard in reader.shards:
            _write_shard(reader, shard, staging / shard, fn, progress)
        copy_other_files(reader, staging)
        if reader.index is not None:
            with writing(staging / INDEX_FILE):
                shutil.copyfile(reader.file(INDEX_FILE), staging / INDEX_FILE)
        with writing(out):
            _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _check_output(reader: CheckpointReader, out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; name a folder to write to")
    if out.resolve().is_relative_to(reader.folder.resolve()):
        raise CheckpointError(f"{out}: is the input's folder or lies in it; name another folder to write to")
    if not overwrite and out.is_dir() and any(path.name != _STAGING for path in out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; name another folder, or ask to overwrite it")
    needed = reader.n_bytes + sum(reader.file(name).stat().st_size for name in reader.other_files)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{out}: no space: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free; "
            "free some, or name a folder on another disk"
        )


def _write_shard(
    reader: CheckpointReader,
    shard: str,
    path: Path,
    fn: Callable[[str, Tensor], Tensor],
    progress: Callable[[TensorInfo], None] | None,
) -> None:
    header = reader.headers[shard]
    with writing(path):
        file = path.open("xb", buffering=0)  # a buffer would be written, and fail, once more on closing
    with file:
        write_all(file, memoryview(header.raw), path)
        for info in header.tensors:
            write_all(file, _bytes_of(fn(info.name, reader.read(info.name)), info), path)
            if progress is not None:
                progress(info)


def _bytes_of(tensor: Tensor, info: TensorInfo) -> memoryview:
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise CheckpointError(
            f"{info.name}: was {info.dtype} {info.shape} and became {tensor.dtype} {tuple(tensor.shape)}; "
            "a transform must keep dtype and shape"
        )
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _publish(staging: Path, out: Path) -> None:
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    for name in files:
        with (staging / name).open("r+b") as file:
            os.fsync(file.fileno())
    for stale in out.iterdir():
        if is_weight_file(stale) and Path(stale.name) not in files:
            stale.unlink()
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(out / name)
