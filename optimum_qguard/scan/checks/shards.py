"""Whether all files of a checkpoint are there, and hold what its index says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import TensorInfo
from optimum_qguard.checkpoint.index import INDEX_SUFFIX, Index, parse_index
from optimum_qguard.checkpoint.repository import LARGEST_JSON, FolderRepository
from optimum_qguard.scan.finding import Finding, Severity, listed
from optimum_qguard.scan.subject import Subject

_NUMBERED = re.compile(r"(?P<series>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors", re.ASCII | re.DOTALL)


def check_shards(subject: Subject) -> Iterator[Finding]:
    """Indices against files and headers, numbered files against their numbers, and links that leave the folder."""
    repository = subject.repository
    if isinstance(repository, FolderRepository):
        for link in repository.stray_links:
            message = f"{link} is a link out of the folder, or to nowhere, and was not followed."
            yield _finding("note", link, message, unsettled=True)
        if Path(repository.name).expanduser().is_file():
            return
    inside: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in subject.tensors.values():
        inside[tensor.file][tensor.info.name] = tensor.info
    named: set[str] = set()
    for file in repository.files:
        if not file.endswith(INDEX_SUFFIX):
            continue
        try:
            if repository.files[file].size > LARGEST_JSON:
                raise CheckpointError(f"{file}: is too long for an index")
            index = parse_index(repository.read(file), file)
        except CheckpointError as error:
            yield _finding("error", file, str(error))
            continue
        folder = PurePosixPath(file).parent
        shards = {shard: (folder / shard).as_posix() for shard in index.shards}
        named |= set(shards.values())
        yield from _check_index(file, index, shards, inside, subject)
        single = file.removesuffix(".index.json")
        if single in repository.files and single not in shards.values():
            yield _finding(
                "note", single, f"{single} lies beside {file}, and which one is loaded depends on the reader."
            )
    yield from _check_numbers(subject, named)


def _check_index(
    file: str, index: Index, shards: dict[str, str], inside: dict[str, dict[str, TensorInfo]], subject: Subject
) -> Iterator[Finding]:
    missing = [path for path in shards.values() if path not in subject.repository.files]
    if missing:
        yield _finding("error", file, f"{file} names files that are not there: {listed(missing)}.")
    readable = {shard: inside[path] for shard, path in shards.items() if path in inside}
    absent = [name for name, shard in index.weight_map.items() if shard in readable and name not in readable[shard]]
    if absent:
        yield _finding("error", file, f"Tensors are not in the file where {file} says they are: {listed(absent)}.")
    times: dict[str, int] = defaultdict(int)
    for tensors in readable.values():
        for name in tensors:
            times[name] += 1
    several = [name for name, count in times.items() if count > 1]
    if several:
        message = f"Tensors are in several files of {file}, and which one is loaded depends on the reader"
        yield _finding("error", file, f"{message}: {listed(several)}.")
    extra = [name for name in times if name not in index.weight_map]
    if extra:
        yield _finding("note", file, f"Tensors are in the files but not in {file}: {listed(extra)}.")
    if index.total_size is not None and not missing and len(readable) == len(shards):
        total = sum(info.n_bytes for tensors in readable.values() for info in tensors.values())
        if total != index.total_size:
            message = f"{file} says that the tensors have {index.total_size:,} bytes together; they have {total:,}."
            yield _finding("note", file, message)


def _check_numbers(subject: Subject, named: set[str]) -> Iterator[Finding]:
    """Files that are numbered but that no index names."""
    series: dict[tuple[str, int], set[int]] = defaultdict(set)
    for file in subject.repository.files:
        match = _NUMBERED.fullmatch(file)
        if match is not None:
            series[match["series"], int(match["total"])].add(int(match["number"]))
    for (name, total), numbers in series.items():
        files = {
            number: f"{name}-{number:05d}-of-{total:05d}.safetensors" for number in {*numbers, *range(1, total + 1)}
        }
        missing = [file for number, file in sorted(files.items()) if number not in numbers and file not in named]
        if missing:
            yield _finding("error", None, f"Files of a checkpoint in {total} parts are missing: {listed(missing)}.")
        unnamed = [files[number] for number in sorted(numbers) if files[number] not in named]
        if unnamed:
            yield _finding("note", None, f"No index names these parts of a checkpoint: {listed(unnamed)}.")


def _finding(severity: Severity, file: str | None, message: str, *, unsettled: bool = False) -> Finding:
    return Finding(detector="integrity", severity=severity, file=file, message=message, unsettled=unsettled)
