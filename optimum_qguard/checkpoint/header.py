"""The header of a safetensors file: what tensors are in it, read without their data.

A file is 8 bytes with the header's length, the header (JSON: dtype, shape and offsets by tensor name), and the data.
Format: https://github.com/huggingface/safetensors#format

Whatever the bytes are, they are either a header that adds up to the file's length, tensor after tensor, or one error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.json_object import parse_object


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
_LENGTH_FIELD = 8
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 1000

MAX_HEADER_BYTES = 16 << 20
"""100,000 tensors have less; JSON takes up to twenty times its length in memory."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor.

    Attributes:
        name: the tensor's name.
        dtype: as torch calls it.
        shape: as stored.
        shard: name of the file that holds it.
        n_bytes: length of its data.
        offset: where its data begins, from the file's first byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    n_bytes: int
    offset: int

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
    """Read and check the header of a safetensors file on this machine.

    Raises:
        CheckpointError: see `parse_header`.
    """

    def read(start: int, length: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    try:
        return parse_header(read, path.stat().st_size, str(path))
    except OSError as error:
        raise _broken(str(path), error.strerror or str(error)) from error


def parse_header(read: Callable[[int, int], bytes], size: int, file: str) -> Header:
    """Check a file's header: only what is sure to be sound is returned.

    Args:
        read: gives ``length`` bytes from ``start`` on.
        size: of the whole file.
        file: what errors call it; its last part is the tensors' ``shard``.

    Raises:
        CheckpointError: not a safetensors file, truncated (a Git LFS pointer, an interrupted download), tensors that
            overlap, leave gaps, or have another length than their shape and dtype say, or a dtype that torch does not
            have.
    """
    raw = read(0, min(_LENGTH_FIELD, size))
    length = int.from_bytes(raw, "little")
    if len(raw) < _LENGTH_FIELD or length > size - _LENGTH_FIELD:
        raise _broken(file, "its header would end behind the file's end")
    if length > MAX_HEADER_BYTES:
        raise _broken(file, f"its header is {length / 1e6:,.0f} MB long, which no model needs")
    text = read(_LENGTH_FIELD, length)
    entries = _parse_json(text, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "its metadata is not text")
    found = [_tensor_info(file, name, entry, _LENGTH_FIELD + length) for name, entry in entries.items()]
    found.sort(key=lambda info: (info.offset, info.n_bytes))
    end = _LENGTH_FIELD + length
    for info in found:
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise _broken(file, f"tensor {info.name} {kind}")
        end += info.n_bytes
    if end != size:
        raise _broken(file, f"its tensors end at byte {end}, and the file at byte {size}")
    return Header(raw + text, tuple(found), metadata)


def _parse_json(text: bytes, file: str) -> dict[str, Any]:
    try:
        return parse_object(text, strict=True)
    except ValueError as error:
        raise _broken(file, f"its header is no JSON: {error}") from error


def _tensor_info(file: str, name: str, entry: Any, data: int) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise _broken(file, f"{name!r:.100} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"tensor {name} has not exactly a dtype, a shape and offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and all(map(is_size, shape))):
        raise _broken(file, f"tensor {name} has an impossible shape")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets)) and offsets[0] <= offsets[1]
    ):
        raise _broken(file, f"tensor {name} has impossible offsets")
    stored = entry["dtype"]
    if not isinstance(stored, str):
        raise _broken(file, f"tensor {name} has an impossible dtype")
    dtype = _DTYPES.get(stored)
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name} is {stored:.40}, which this version of torch does not have")
    start, end = offsets
    if 8 * (end - start) != math.prod(shape) * _bits(stored, dtype):
        raise _broken(file, f"tensor {name} has another length than its shape and dtype say")
    return TensorInfo(name, dtype, tuple(shape), Path(file).name, end - start, data + start)


def _bits(name: str, dtype: torch.dtype) -> int:
    return 4 if name == "F4" else 8 * dtype.itemsize


def _broken(file: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a complete safetensors file ({reason}); download or copy it again")
