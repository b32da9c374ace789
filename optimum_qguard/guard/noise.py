"""Calibrate noise by a tensor's quantization cells, and draw it: the mathematics of guard, one tensor at a time.

Three ways to randomize the rounding of a weight ``w`` in a cell of half-width ``h``:

- *stochastic*: ``w`` moves to one of its two neighbouring symbols, with probabilities that make the mean exactly ``w``
  (pre-rounding: the quantizer, given values on its own grid, reproduces them). Variance ``step**2 / 6`` on average.
- *gaussian*: ``w + N(0, sigma**2)``, ``sigma`` the median half-width of the tensor ("Interval-Calibrated Noisy
  Quantization", equations 3 to 5), of the model (equation 4), or a fixed number.
- *uniform*: ``w + U(-a, a)`` with the same choices for ``a``, or half the width of the weight's own cell: on a grid of
  equal steps that is unbiased too, as non-subtractive dither is (variance ``step**2 / 6`` after rounding), and it needs
  no grid that the quantizer is sure to find again.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from optimum_qguard.formats import Format, Grid, Scratch, WeightError, block_ranges, check_finite
from optimum_qguard.guard.random import RandomStream

Method = Literal["stochastic", "gaussian", "uniform"]

COMPILED_FROM = 1 << 22
"""Weights in a tensor. In a model that has none so large the compiled `kernels` would gain less than numba takes to
start, half a second once a process."""

_SAMPLED_WEIGHTS = 1 << 14


@dataclass(frozen=True)
class Draw:
    """One tensor after guard.

    Attributes:
        weight: what the quantizer gets, shaped like the original.
        amplitude: standard deviation (gaussian) or half range (uniform) of the noise in the weight's units; ``None``
            where the grid decides: for stochastic rounding, and for noise of each weight's own half-width.
        share_changed: share of weights that left the cell they were in.
        sampled: how many weights, from all over the tensor, ``share_changed`` was counted on.
    """

    weight: Tensor
    amplitude: float | None
    share_changed: float
    sampled: int


def half_width(weight: Tensor, format: Format, name: str) -> float:
    """``h`` of equation (3): the median half-width of the tensor's cells, in the weight's units.

    Args:
        weight: as the quantizer sees it, see `Format`.

    Raises:
        WeightError: NaN or infinite weights.
    """
    if weight.numel() == 0:
        return 0.0
    grid = format.grid(format.blocks(weight))
    check_grid(grid, weight, name)
    return _median_half_width(weight, format, grid, name)


def _median_half_width(weight: Tensor, format: Format, grid: Grid, name: str) -> float:
    if grid.is_uniform:
        return float(grid.median_half_width(None, format.block_sizes(weight.shape, len(grid.scale))))
    return format.quantize(weight, name).median_half_width()


def draw(
    weight: Tensor,
    format: Format,
    method: Method,
    stream: RandomStream,
    *,
    amplitude: float | None = None,
    half_widths: float | None = None,
    per_cell: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "tensor",
    scratch: Scratch | None = None,
) -> Draw:
    """Randomize one tensor, in pieces that stay in the cache; the only tensor-sized memory it takes is the result.

    Args:
        weight: as the quantizer sees it, see `Format`. Not changed.
        format: what the quantizer will do to it.
        stream: the tensor's random bits.
        amplitude: of gaussian or uniform noise, in the weight's units.
        half_widths: the amplitude in units of the tensor's `half_width`, where ``amplitude`` is not given.
        per_cell: ``half_widths`` is in units of each weight's own half-width instead.
        dtype: of the result; the weight's own by default.
        name: what errors call the tensor.
        scratch: buffers to use; give the same for each tensor of a model.

    Raises:
        WeightError: NaN or infinite weights.
        ValueError: stochastic rounding asked of a format whose quantizer searches its grid.
    """
    if method == "stochastic" and not format.keeps_symbols(weight.dtype):
        raise ValueError(
            f"{name}: stochastic rounding needs a grid that is known beforehand, which {format} has not for "
            f"{weight.dtype} weights: use method='auto' or 'gaussian'"
        )
    blocks = format.blocks(weight)
    result = torch.empty(blocks.shape, dtype=dtype or weight.dtype, device=weight.device)
    changed = sampled = 0
    if weight.numel():
        grid = format.grid(blocks)
        check_grid(grid, weight, name)
        own = per_cell and method != "stochastic"
        if amplitude is None and half_widths is not None and method != "stochastic" and not own:
            amplitude = half_widths * _median_half_width(weight, format, grid, name)
        if amplitude is None and not (own and half_widths is not None) and method != "stochastic":
            raise ValueError(f"{method} noise needs an amplitude")
        of_blocks = grid.scale.abs() / 2 * (half_widths or 0) if own and grid.is_uniform else None
        kernels = _kernels(blocks.numel()) if not own or (of_blocks is not None and method == "uniform") else None
        if kernels is not None and kernels.can_move(method, grid, blocks):
            kernels.move(blocks, result, grid, method, stream, amplitude if of_blocks is None else of_blocks)
        else:
            scratch = scratch or Scratch()
            for part in block_ranges(blocks):
                values = scratch.like(blocks[part], "values").copy_(blocks[part])
                wide = amplitude if of_blocks is None else of_blocks[part]
                if own and of_blocks is None:
                    codes = format.encode(blocks[part], grid[part])
                    wide = grid[part].half_widths(codes) * (half_widths or 0)
                result[part] = _move(values, grid[part], method, stream, part.start * blocks.shape[1], wide, scratch)
        # Odd, because rows that stand at the same place in each attention head are alike.
        sample = slice(None, None, blocks.numel() // _SAMPLED_WEIGHTS | 1)
        changed = _count_changed(format, grid[sample], blocks[sample], result[sample])
        sampled = blocks[sample].numel()
    share = changed / sampled if sampled else 0.0
    return Draw(format.unblock(result, weight.shape), amplitude, share, sampled)


def _kernels(numel: int) -> ModuleType | None:
    """`kernels`, where they pay and numba is installed."""
    if numel < COMPILED_FROM:
        return None
    try:
        return importlib.import_module(f"{__package__}.kernels")
    except ImportError:
        return None


def _move(
    values: Tensor,
    grid: Grid,
    method: Method,
    stream: RandomStream,
    start: int,
    amplitude: float | Tensor | None,
    scratch: Scratch,
) -> Tensor:
    if method == "stochastic":
        uniform = stream.uniform(start, scratch.like(values, "uniform"))
        rounded = grid.round_stochastically(values, uniform, scratch)
        # The quantizer must find the same scale again.
        return rounded if grid.keeps_extremes else rounded.lerp_(values, grid.sets_scale(values, scratch))
    assert amplitude is not None
    noise = scratch.like(values, "noise")
    if method == "gaussian":
        stream.normal(start, noise)
    else:
        stream.uniform(start, noise).mul_(2).sub_(1)
    # Not `add_(alpha=)`, which rounds once or twice depending on the processor.
    return values.add_(noise.mul_(amplitude))


def _count_changed(format: Format, grid: Grid, before: Tensor, after: Tensor) -> int:
    end = torch.stack([grid.edges[0] * grid.scale, grid.edges[-1] * grid.scale])
    if grid.offset is not None:
        end += grid.offset
    low, high = end.amin(0), end.amax(0)
    return int((format.encode(before, grid) != format.encode(after.float().clamp(low, high), grid)).sum())


def check_grid(grid: Grid, weight: Tensor, name: str) -> None:
    """Raise `WeightError` for weights that are NaN or infinite, or too large for what the quantizer computes in."""
    if bool(torch.isfinite(grid.scale).all()) and (grid.offset is None or bool(torch.isfinite(grid.offset).all())):
        return
    check_finite(weight, name)
    raise WeightError(
        f"{name}: weights too large for the quantizer's own precision (largest {float(weight.abs().max())})"
    )
