"""Stochastic rounding and noise, compiled with numba: what `noise` defines in some ten passes, in one.

Bit for bit the same, because these are the same float32 operations in the same order, and numba fuses none of them.
Kernels run without the interpreter's lock, so that threads can share a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from optimum_qguard.formats import Grid, block_ranges
from optimum_qguard.guard.float_bits import DTYPES, array, from_float, to_float
from optimum_qguard.guard.random import CENTRE, SPACING, RandomStream, normal_quantiles

_MOST_SYMBOLS = 16
_MOST_THREADS = 8  # the keystream is made under the interpreter's lock
_CENTRE, _SPACING = np.float32(CENTRE), np.float32(SPACING)
_MAGNITUDE, _NO_MAGNITUDE = np.uint32(0x7FFFFFFF), np.uint32(0xFFFFFFFF)

Function = TypeVar("Function", bound=Callable[..., Any])


def can_move(method: str, grid: Grid, blocks: Tensor) -> bool:
    """Whether `move` knows how: contiguous ``blocks`` on the CPU; noise, or stochastic rounding to integers without
    offset or onto at most 16 symbols."""
    if blocks.device.type != "cpu" or blocks.dtype not in DTYPES or not blocks.is_contiguous():
        return False
    few = grid.is_uniform or len(grid.alphabet) <= _MOST_SYMBOLS
    return method != "stochastic" or (grid.offset is None and few)


def move(
    blocks: Tensor, result: Tensor, grid: Grid, method: str, stream: RandomStream, amplitude: float | Tensor | None
) -> None:
    """Randomize a tensor, in as many threads as torch uses.

    Args:
        blocks: ``(n_blocks, block_size)``, see `can_move`.
        result: where the moved blocks go; contiguous, float32, bfloat16 or float16.
        grid: of the blocks.
        method: ``"stochastic"``, ``"gaussian"`` or ``"uniform"``.
        stream: the tensor's random bits.
        amplitude: of noise, in the weight's units; of uniform noise also each block's, ``(n_blocks, 1)`` float32.
    """
    parts = list(block_ranges(blocks))
    threads = min(torch.get_num_threads(), _MOST_THREADS, len(parts))
    inverses, scales = grid.inverse.contiguous(), grid.scale.contiguous()
    low, high = (np.float32(end) for end in grid.ends)
    alphabet = tuple(grid.alphabet.tolist())
    keep = not grid.keeps_extremes
    wide = None if amplitude is None else torch.as_tensor(amplitude, dtype=torch.float32).expand(len(blocks), 1)

    def run(thread: int) -> None:
        own = stream.fork()
        for part in parts[thread::threads]:
            values, out = array(blocks[part]), array(result[part])
            words = own.words(part.start * blocks.shape[1], values.size).numpy().reshape(values.shape)
            inverse, scale = inverses[part, 0].numpy(), scales[part, 0].numpy()
            if wide is not None and method == "gaussian":
                _add_normal(values, words.view(np.uint16), normal_quantiles().numpy(), np.float32(amplitude), out)
            elif wide is not None:
                _add_uniform(values, words, wide[part, 0].numpy(), out)
            elif grid.is_uniform:
                _round_to_integers(values, words, inverse, scale, low, high, keep, out)
            else:
                _round_to_symbols(alphabet)(values, words, inverse, scale, keep, out)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, range(threads)):
            pass


def _compiled(function: Function) -> Function:
    """Compiled when first called, for the arguments' types. Later processes find the code in numba's cache, beside this
    file or in the user's cache folder, unless neither can be written."""
    try:
        kernel: Function = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        kernel = numba.njit(nogil=True)(function)
    return kernel


@_compiled
def _magnitude(value: Any) -> Any:
    """The bits of ``abs(value)``, which are ordered like it."""
    return np.uint32(np.float32(value).view(np.uint32) & _MAGNITUDE)


@_compiled
def _greatest(values: Any) -> Any:
    greatest = np.uint32(0)
    for index in range(values.shape[0]):
        greatest = max(greatest, _magnitude(to_float(values[index])))
    return greatest


@_compiled
def _round_to_integers(
    values: Any, words: Any, inverses: Any, scales: Any, low: Any, high: Any, keep: bool, out: Any
) -> None:
    """`Grid.round_stochastically` on a uniform grid.

    Args:
        values: ``(n_blocks, block_size)``.
        words: as many random int16.
        inverses: ``(n_blocks,)`` float32, what values are multiplied by.
        scales: ``(n_blocks,)`` float32, what symbols are multiplied by.
        low: the least symbol, float32.
        high: the greatest symbol.
        keep: leave each block's greatest magnitude where it is.
        out: shaped like ``values``.
    """
    for block in range(values.shape[0]):
        kept = _greatest(values[block]) if keep else _NO_MAGNITUDE
        inverse, scale = inverses[block], scales[block]
        for index in range(values.shape[1]):
            value = to_float(values[block, index])
            uniform = _CENTRE + np.float32(words[block, index]) * _SPACING
            symbol = np.floor(uniform + value * inverse)
            symbol = low if symbol < low else symbol
            symbol = high if symbol > high else symbol
            moved = value if _magnitude(value) == kept else symbol * scale
            out[block, index] = from_float(moved, out[block, index])


@cache
def _round_to_symbols(alphabet: tuple[float, ...]) -> Callable[..., None]:
    """`Grid.round_stochastically` onto a few symbols of any spacing, which become part of the code: a function of the
    arguments of `_round_to_integers` without ``low`` and ``high``."""
    symbols = np.array(alphabet, np.float32)
    last = len(alphabet) - 1

    @_compiled
    def kernel(values: Any, words: Any, inverses: Any, scales: Any, keep: bool, out: Any) -> None:
        for block in range(values.shape[0]):
            kept = _greatest(values[block]) if keep else _NO_MAGNITUDE
            inverse, scale = inverses[block], scales[block]
            for index in range(values.shape[1]):
                value = to_float(values[block, index])
                units = np.float32(value * inverse)
                below, above = symbols[0], symbols[1]
                for code in range(1, last):
                    beyond = units >= symbols[code]
                    below = symbols[code] if beyond else below
                    above = symbols[code + 1] if beyond else above
                uniform = _CENTRE + np.float32(words[block, index]) * _SPACING
                symbol = above if units >= below + uniform * (above - below) else below
                moved = value if _magnitude(value) == kept else symbol * scale
                out[block, index] = from_float(moved, out[block, index])

    return kernel


@_compiled
def _add_uniform(values: Any, words: Any, amplitudes: Any, out: Any) -> None:
    """Uniform noise.

    Args:
        values: ``(n_blocks, block_size)``.
        words: as many random int16.
        amplitudes: ``(n_blocks,)`` float32, half the noise's range.
        out: shaped like ``values``.
    """
    two, one = np.float32(2), np.float32(1)
    for block in range(values.shape[0]):
        for index in range(values.shape[1]):
            uniform = _CENTRE + np.float32(words[block, index]) * _SPACING
            moved = to_float(values[block, index]) + (uniform * two - one) * amplitudes[block]
            out[block, index] = from_float(moved, out[block, index])


@_compiled
def _add_normal(values: Any, words: Any, quantiles: Any, amplitude: Any, out: Any) -> None:
    """Gaussian noise.

    Args:
        values: ``(n_blocks, block_size)``.
        words: as many random uint16.
        quantiles: ``(65536,)`` float32, the standard normal number of each word.
        amplitude: float32.
        out: shaped like ``values``.
    """
    noise = np.empty(values.shape[1], np.float32)  # apart, because looking up does not vectorize and the rest does
    for block in range(values.shape[0]):
        for index in range(values.shape[1]):
            noise[index] = quantiles[words[block, index]]
        for index in range(values.shape[1]):
            moved = to_float(values[block, index]) + noise[index] * amplitude
            out[block, index] = from_float(moved, out[block, index])
