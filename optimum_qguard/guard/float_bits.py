"""Tensors of float32, bfloat16 and float16 in code that numba compiles, which knows only the first: bits of the others
travel as uint16 and int16, and become float32 and come back one by one, in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
DTYPES = frozenset(_BITS)
_UPPER, _HALF, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor of one of `DTYPES`."""
    return tensor.view(_BITS[tensor.dtype]).numpy()


def to_float(bits: Any) -> Any:
    """An element of an `array`, as float32. For compiled code only."""
    raise NotImplementedError


def from_float(value: Any, like: Any) -> Any:
    """A float32, rounded half to even, as an element of the `array` that ``like`` is an element of. For compiled code
    only; NaN is not kept."""
    raise NotImplementedError


@intrinsic  # type: ignore[untyped-decorator]
def _from_float16(_typing: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _to_float16(_typing: Any, _value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@overload(to_float)
def _to_float(bits):  # type: ignore[no-untyped-def]
    if bits == types.float32:
        return lambda bits: bits
    if bits == types.int16:
        return lambda bits: _from_float16(bits)
    return lambda bits: np.uint32(np.uint32(bits) << _UPPER).view(np.float32)


@overload(from_float)
def _from_float(value, like):  # type: ignore[no-untyped-def]
    # ruff: noqa: ARG001, ARG005
    if like == types.float32:
        return lambda value, like: value
    if like == types.int16:
        return lambda value, like: _to_float16(value)

    def to_bfloat16(value, like):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        return np.uint16((bits + _HALF + ((bits >> _UPPER) & _ONE)) >> _UPPER)

    return to_bfloat16
