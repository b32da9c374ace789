"""Numbers and orthogonal matrices that a key draws by name, the same for ever (matrices up to float64's rounding)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_qguard.encrypt.key import Key


def uniforms(key: Key, name: str, count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1), of 53 bits each: eight bytes of the stream, little-endian."""
    drawn = np.frombuffer(key.stream(name, 8 * count), "<u8") >> np.uint64(11)
    numbers: NDArray[np.float64] = drawn * 2.0**-53
    return numbers


def orthogonal(key: Key, name: str, size: int) -> Tensor:
    """An orthogonal matrix ``(size, size)``, float64.

    Where ``size`` is a power of two it is a Hadamard matrix divided by ``sqrt(size)``, its columns in an order and its
    rows with signs that the key draws: eight bytes a column, a number, by which they are sorted, then a byte a row,
    whose lowest bit is the sign. Otherwise it is drawn uniformly: Q of the QR decomposition of normal numbers.
    """
    if size & (size - 1) == 0:
        stream = key.stream(name, 9 * size)
        order = np.argsort(np.frombuffer(stream, "<u8", size), kind="stable")
        signs = 1.0 - 2.0 * (np.frombuffer(stream, np.uint8, size, 8 * size) & 1)
        return torch.from_numpy(signs[:, None] * hadamard(size)[:, order] * size**-0.5)
    drawn = uniforms(key, name, 2 * size * size).reshape(2, size, size)
    normal = np.sqrt(-2 * np.log1p(-drawn[0])) * np.cos(2 * np.pi * drawn[1])
    q, r = np.linalg.qr(normal)
    return torch.from_numpy(q * np.sign(np.diag(r)))


def hadamard(size: int) -> NDArray[np.float64]:
    """Sylvester's matrix of ones and minus ones ``(size, size)``, for a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
