"""Writes a checkpoint out in the layout of another one, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from optimum_qguard.checkpoint.atomic import write_all, writing
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.flush import flushing
from optimum_qguard.checkpoint.header import TensorInfo
from optimum_qguard.checkpoint.output import check_output, check_space, copy_other_files, output_folder
from optimum_qguard.checkpoint.reader import INDEX_FILE, CheckpointReader


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
    check_output(out, reader.folder, overwrite=overwrite)
    check_space(out, reader.n_bytes + sum(reader.file(name).stat().st_size for name in reader.other_files))
    with output_folder(out, reader.folder, overwrite=overwrite, flushed=reader.shards) as staging:
        write_transformed(reader, staging, fn, progress=progress)


def write_transformed(
    reader: CheckpointReader,
    folder: Path,
    fn: Callable[[str, Tensor], Tensor],
    *,
    progress: Callable[[TensorInfo], None] | None = None,
) -> None:
    """What `transform_checkpoint` writes, into a folder that exists and has no files of these names.

    Weight files are on the disk, flushed, when this returns.

    Args:
        reader, fn, progress: see `transform_checkpoint`.

    Raises:
        CheckpointError: a write failed; or ``fn`` returned another shape or dtype.
    """
    for shard in reader.shards:
        _write_shard(reader, shard, folder / shard, fn, progress)
    copy_other_files(reader, folder)
    if reader.index is not None:
        with writing(folder / INDEX_FILE):
            shutil.copyfile(reader.file(INDEX_FILE), folder / INDEX_FILE)


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
    with file, flushing(file, path) as flush:
        write_all(file, memoryview(header.raw), path)
        for info in header.tensors:
            content = _bytes_of(fn(info.name, reader.read(info.name)), info)
            write_all(file, content, path)
            flush.written(len(content))
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
