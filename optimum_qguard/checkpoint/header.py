"""The header of a safetensors file: what tensors are in it, read without their data.

A file is 8 bytes with the header's length, the header (JSON: dtype, shape and offsets by tensor name), and the data.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from optimum_qguard.checkpoint.errors import CheckpointError


def _torch_dtypes() -> dict[str, torch.dtype]:
    names = {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
    }
    return {name: getattr(torch, torch_name) for name, torch_name in names.items() if hasattr(torch, torch_name)}


_DTYPES = _torch_dtypes()


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor.

    Attributes:
        name: the tensor's name.
        dtype: as torch calls it.
        shape: as stored.
        shard: name of the file that holds it.
        n_bytes: length of its data.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file's header: the raw bytes (length field included), and the tensors in the order of their data."""

    raw: bytes
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]

    @property
    def n_bytes(self) -> int:
        """Length of the whole file."""
        return len(self.raw) + sum(tensor.n_bytes for tensor in self.tensors)


def read_header(path: Path) -> Header:
    """Read and check a safetensors file's header.

    Raises:
        CheckpointError: not a safetensors file, truncated (a Git LFS pointer, an interrupted download), or a dtype
            that torch does not have.
    """
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            metadata = dict(file.metadata() or {})
        with path.open("rb") as stream:
            length = stream.read(8)
            raw = length + stream.read(int.from_bytes(length, "little"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); download or copy it again"
        ) from error
    entries = {name: entry for name, entry in json.loads(raw[8:]).items() if name != "__metadata__"}
    ordered = sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"]))
    return Header(raw, tuple(_tensor_info(path, name, entry) for name, entry in ordered), metadata)


def _tensor_info(path: Path, name: str, entry: dict[str, list[int]]) -> TensorInfo:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}, which this version of torch does not have")
    start, end = entry["data_offsets"]
    return TensorInfo(name, dtype, tuple(entry["shape"]), path.name, end - start)
