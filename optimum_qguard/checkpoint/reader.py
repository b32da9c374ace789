"""Reads a safetensors checkpoint tensor by tensor. Never unpickles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import Header, TensorInfo, read_header
from optimum_qguard.checkpoint.hub import download_snapshot, looks_like_hub_id
from optimum_qguard.checkpoint.index import parse_index
from optimum_qguard.checkpoint.json_object import parse_object
from optimum_qguard.checkpoint.local import local_path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {
    ".gguf",
    ".h5",
    ".keras",
    ".mlmodel",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ort",
    ".ot",
    ".pb",
    ".safetensors",
    ".tflite",
}
_SECRET_SUFFIXES = frozenset({".key", ".pem"})
_KEY_CONTENT = re.compile(rb'"key":\s*"[0-9a-f]{64}"|-----BEGIN [A-Z ]*PRIVATE KEY-----')
_MOST_KEY_BYTES = 1 << 16


class CheckpointReader:
    """A checkpoint whose headers have been read and checked, and whose tensors are read one at a time.

    Attributes:
        folder: where it lies on this machine.
        shards: names of its safetensors files.
        index: the text of ``model.safetensors.index.json``, or ``None`` for a single file.
        tensors: by name, in the order in which they are stored.
        config: ``config.json``, empty if there is none.
        other_files: configuration, tokenizer, model card and so on, relative to ``folder``; weight files in other
            formats, hidden files and keys (by their names or their content) are left out.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder, or one ``.safetensors`` file on its own (which has no config and no other files).

        Raises:
            CheckpointError: see `open_checkpoint`.
        """
        is_file = path.is_file()
        self.folder = path.parent if is_file else path
        self._roots = (path.resolve().parent,) if is_file else _allowed_roots(path)
        self.index: str | None = None
        weight_map: Mapping[str, str] = {}
        if is_file:
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path}: not a .safetensors file{_conversion_hint([path])}")
            self.shards: tuple[str, ...] = (path.name,)
        elif (path / SINGLE_FILE).exists():
            self.shards = (SINGLE_FILE,)
        elif (path / INDEX_FILE).exists():
            path_of_index = self._inside(INDEX_FILE)
            index = parse_index(path_of_index.read_bytes(), str(path_of_index))
            self.index, weight_map = path_of_index.read_bytes().decode(), index.weight_map
            self.shards = tuple(index.shards)
        else:
            raise _no_weights(path)
        self.headers: Mapping[str, Header] = MappingProxyType({shard: self._header(shard) for shard in self.shards})
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(self.headers))
        for name, shard in weight_map.items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise CheckpointError(
                    f"{path / shard}: tensor {name} is not in it although {INDEX_FILE} says so; "
                    "download the repository again"
                )
        self.config: dict[str, Any] = {} if is_file else self._read_config()
        self.other_files: tuple[PurePosixPath, ...] = () if is_file else tuple(self._find_other_files())

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What ``config.json`` says about how the weights are quantized already; ``None`` if they are not."""
        return self.config.get("quantization_config")

    @property
    def n_bytes(self) -> int:
        """Length of all safetensors files together."""
        return sum(header.n_bytes for header in self.headers.values())

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped: writing into it changes this process's copy only.

        Raises:
            KeyError: no such tensor.
        """
        path = self.file(self.tensors[name].shard)
        # Opened anew for each tensor, so that the pages of the one before are given back.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors in the order in which they are stored, one at a time."""
        for name in self.tensors:
            yield name, self.read(name)

    def file(self, name: str | PurePosixPath) -> Path:
        """Local path of a shard or of one of `other_files`."""
        return self.folder / name

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"CheckpointReader({str(self.folder)!r}: {len(self)} tensors, {len(self.shards)} file(s))"

    def _header(self, shard: str) -> Header:
        path = self._inside(shard)
        if not path.is_file():
            raise CheckpointError(f"{path}: missing although {INDEX_FILE} names it; download the repository again")
        return read_header(path)

    def _read_config(self) -> dict[str, Any]:
        if not self.file(CONFIG_FILE).exists():
            return {}
        return _read_json(self._inside(CONFIG_FILE))

    def _find_other_files(self) -> Iterator[PurePosixPath]:
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or path.is_dir() or is_weight_file(path) or is_key_file(path):
                continue
            self._inside(relative.as_posix())
            if holds_key(path):
                continue
            yield PurePosixPath(relative.as_posix())

    def _inside(self, name: str) -> Path:
        """``folder / name``, if that does not lead out of the folder."""
        path = self.folder / name
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{path}: leads out of the checkpoint's folder, to {target}; "
                "put a copy of the file there if you trust it"
            )
        return path


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> CheckpointReader:
    """Open a folder, a ``.safetensors`` file, or a Hub repository (``org/name``, optionally ``org/name@revision``).

    Raises:
        CheckpointError: the folder or repository is missing, has no safetensors weights, a shard is missing, truncated
            or malformed, the index names a tensor that is not there or a file outside the folder.
    """
    path = local_path(model, revision)
    if path is not None:
        return CheckpointReader(path)
    if isinstance(model, str) and looks_like_hub_id(model):
        return CheckpointReader(download_snapshot(model, revision))
    raise CheckpointError(f"{model}: no such folder or file")


def _allowed_roots(folder: Path) -> tuple[Path, ...]:
    """Where links in a folder may lead: into it and, in the Hub's cache, from snapshots/<revision>/ to blobs/."""
    root = folder.resolve()
    return (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)


def is_weight_file(path: Path) -> bool:
    """Whether a file holds weights, in whatever format, or is an index of such files."""
    return path.suffix.lower() in WEIGHT_SUFFIXES or path.name.endswith(".index.json")


def is_key_file(path: PurePath) -> bool:
    """Whether a file is a key by its name."""
    return path.suffix.lower() in _SECRET_SUFFIXES


def holds_key(path: Path) -> bool:
    """Whether a file has a key of ours or a private key in it, whatever its name is; not if it cannot be read."""
    try:
        small = path.is_file() and path.stat().st_size <= _MOST_KEY_BYTES
        return small and _KEY_CONTENT.search(path.read_bytes()) is not None
    except OSError:
        return False


def _no_weights(folder: Path) -> CheckpointError:
    others = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if any(path.name.startswith("adapter_") for path in others):
        return CheckpointError(f"{folder}: holds an adapter (LoRA) alone; merge it into its model, and name that")
    if others:
        return CheckpointError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} in it; "
            f"to open {others[0].name}, give the path of that file"
        )
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    return CheckpointError(f"{folder}: no safetensors weights in it{_conversion_hint(pickles)}")


def _conversion_hint(paths: list[Path]) -> str:
    if not any(path.suffix in PICKLE_SUFFIXES for path in paths):
        return ""
    return (
        f" ({paths[0].name} is a pickle: opening it could run code, so it is refused); "
        "if you trust its publisher, convert it: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


def _merge(headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        for info in header.tensors:
            if info.name in tensors:
                raise CheckpointError(
                    f"tensor {info.name} is both in {tensors[info.name].shard} and in {info.shard}; "
                    "download the repository again"
                )
            tensors[info.name] = info
    return tensors
