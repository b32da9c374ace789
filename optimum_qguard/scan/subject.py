"""What is scanned: a repository's files, and what its headers and configuration say. Nothing of it is believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import TensorInfo, parse_header
from optimum_qguard.checkpoint.protection import MANIFEST_FILE
from optimum_qguard.checkpoint.reader import CONFIG_FILE
from optimum_qguard.checkpoint.repository import Repository, read_object

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_READ = 128 << 20
_LARGEST_TRANSPOSED = 512 << 20
ALIGNMENT = 256
"""Weights: the longest quantization block."""

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a repository.

    Attributes:
        id: its name, or ``file:name`` where several files have tensors of this name; unique whatever the names are.
        file: that holds it.
        info: what the file's header says.
        transposed: whether it is stored as ``(in_features, out_features)`` (``Conv1D``).
    """

    id: str
    file: str
    info: TensorInfo
    transposed: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that have not been quantized."""
        return self.info.dtype in _FLOATS


@dataclass(frozen=True)
class Subject:
    """See the module.

    Attributes:
        repository: its files.
        tensors: by `StoredTensor.id`, file by file in the order in which they are stored.
        config: ``config.json``, empty if there is none or it is broken.
        manifest: ``qguard.json``, likewise.
        problems: what could not be read, by file, in one line each.
        base: the repository that this one claims to be a fine-tune of.
        full: whether all weights are looked at, not a sample of them.
        deep: whether the model may be run.
        seed: of the sample.
    """

    repository: Repository
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    problems: Mapping[str, str] = field(default_factory=dict)
    base: Subject | None = None
    full: bool = False
    deep: bool = False
    seed: int = 0

    def local_folder(self) -> Path:
        """Where the repository lies on this machine, to run the model from; a Hub repository is downloaded.

        Raises:
            CheckpointError: it cannot be.
        """
        from optimum_qguard.checkpoint.hub import download_snapshot

        folder = self.repository.local_folder
        return folder if folder is not None else download_snapshot(self.repository.name, self.repository.revision)


def read_subject(repository: Repository, **options: Any) -> Subject:
    """Read every safetensors header, the configuration and the manifest.

    Args:
        options: further attributes of `Subject`.
    """
    problems: dict[str, str] = {}
    config = _read_json(repository, CONFIG_FILE, problems)
    found: list[tuple[str, TensorInfo]] = []
    for name, file in repository.files.items():
        if not name.endswith(".safetensors"):
            continue
        try:
            header = parse_header(partial(repository.read, name), file.size, name)
        except CheckpointError as error:
            problems[name] = str(error)
        else:
            found += [(name, info) for info in header.tensors]
    times = Counter(info.name for _, info in found)
    is_conv1d = str(config.get("model_type")) in _CONV1D
    tensors: dict[str, StoredTensor] = {}
    for file_name, info in found:
        id = info.name if times[info.name] == 1 else f"{file_name}:{info.name}"
        while id in tensors:  # or a tensor of such a name could take another one's place
            id = f"{file_name}:{id}"
        transposed = is_conv1d and len(info.shape) == 2 and info.name.endswith(_CONV1D_NAMES)
        if _read_at_once(info, transposed) > (_LARGEST_TRANSPOSED if transposed else _LARGEST_READ):
            problems[file_name] = f"{file_name}: tensor {info.name} has the shape {info.shape}, which no model has"
        else:
            tensors[id] = StoredTensor(id, file_name, info, transposed)
    manifest = _read_json(repository, MANIFEST_FILE, problems)
    return Subject(repository, tensors, config, manifest, problems, **options)


def _read_at_once(info: TensorInfo, transposed: bool) -> int:
    """How many bytes the shortest piece has that a detector can look at: see `sample`."""
    if transposed or len(info.shape) < 2 or info.n_bytes == 0:
        return info.n_bytes
    length = info.shape[-1]
    return min(info.n_bytes, ALIGNMENT // math.gcd(length, ALIGNMENT) * length * info.dtype.itemsize)


def _read_json(repository: Repository, name: str, problems: dict[str, str]) -> dict[str, Any]:
    if name not in repository.files:
        return {}
    try:
        return read_object(repository, name)
    except CheckpointError as error:
        problems[name] = str(error)
    return {}
