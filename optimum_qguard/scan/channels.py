"""How large a tensor's rows and columns are, from a sample of it: what a scaling of channels cannot hide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_qguard.scan.sample import Sample

_ROWS, _COLUMNS = 64, 256

Octaves = NDArray[np.float32]
"""Sizes as base-2 logarithms; NaN where nothing is known, or all is zero."""


@dataclass(frozen=True)
class Channels:
    """Typical sizes: geometric means, which single outliers hardly move.

    Attributes:
        shape: of the whole tensor.
        columns: ``(in_features,)`` float16, over the rows that were looked at, and ``counted``, how many those were.
        first_rows, rows: where runs of rows begin, and the sizes of all of them, run by run, float16.
    """

    shape: tuple[int, ...]
    columns: NDArray[np.float16]
    counted: int
    first_rows: tuple[int, ...]
    rows: NDArray[np.float16]


def measure(samples: Sequence[Sample]) -> list[Channels]:
    """The sizes of pieces of tensors, whose rows have one shape. A vector is one row; its columns are its entries."""
    n_rows, length = samples[0].rows.shape
    few = torch.stack([sample.rows[:: max(1, n_rows // _ROWS)] for sample in samples])
    some = torch.stack([sample.rows[:, :: max(1, length // _COLUMNS)] for sample in samples])
    each = zip(samples, _octaves(few, 1), _octaves(some, 2), strict=True)
    return [Channels(of.shape, columns, few.shape[1], of.first_rows, rows) for of, columns, rows in each]


def merge_columns(pieces: Sequence[Channels]) -> Octaves:
    """``(in_features,)``: of all pieces of one tensor together."""
    if len(pieces) == 1:
        return pieces[0].columns.astype(np.float32)
    counted = np.array([piece.counted for piece in pieces], np.float32)
    columns = np.stack([piece.columns for piece in pieces]).astype(np.float32)
    weights = np.where(np.isnan(columns), 0, counted[:, None])
    with np.errstate(invalid="ignore"):
        merged: Octaves = np.nansum(columns * weights, 0) / weights.sum(0)
    return merged


def merge_rows(pieces: Sequence[Channels]) -> Octaves:
    """``(out_features,)``: of all pieces of one tensor together, NaN for rows that no piece has."""
    shape = pieces[0].shape
    found = np.full(int(np.prod(shape[:-1])), np.nan, np.float32)
    for piece in pieces:
        runs = len(piece.first_rows)
        each = -(-len(piece.rows) // runs)
        for index, first in enumerate(piece.first_rows):
            run = piece.rows[index * each : (index + 1) * each]
            found[first : first + len(run)] = run
    return found


def median(octaves: Octaves) -> float:
    """Of those that are known; NaN if none is. Of two in the middle the lower one: that of a channel.

    NumPy's own takes ten times as long for so few.
    """
    known = np.sort(octaves[~np.isnan(octaves)])
    return float(known[(len(known) - 1) // 2]) if len(known) else np.nan


def _octaves(weights: Tensor, dimension: int) -> NDArray[np.float16]:
    magnitude = weights.float().abs()
    some = magnitude > 0
    octaves = magnitude.masked_fill_(~some, 1).log2_().sum(dimension) / some.sum(dimension)  # 0/0 is NaN
    found: NDArray[np.float16] = octaves.half().numpy()
    return found
