"""The half-widths of a checkpoint's quantization cells, read tensor by tensor; the model is never loaded.

Source: equations (3) and (4), and figures 2 and 3, of "Interval-Calibrated Noisy Quantization".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.formats import Format
from optimum_qguard.guard.noise import half_width
from optimum_qguard.guard.outliers import clip_outliers
from optimum_qguard.guard.targets import Target, find_targets

_SAMPLED_PER_BLOCK = 32
_MANY_SYMBOLS = 128


class Named(Protocol):
    """Anything with a tensor's name."""

    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)

Progress = Callable[[int, int], None]
"""Called after each tensor with how many weights are done, and of how many."""


@dataclass(frozen=True)
class TensorHalfWidth:
    """One tensor: its name, its format's name, how many weights it has, and its median half-width ``h``."""

    name: str
    format: str
    weights: int
    half_width: float


@dataclass(frozen=True)
class CellSample:
    """Some weights of all tensors, each tensor by its size: float32 ``(n,)`` values and the ends of their cells
    (infinite where the quantizer clamps), and half the cells' nominal width."""

    values: Tensor
    lower: Tensor
    upper: Tensor
    half_widths: Tensor

    def share_changed(self, sigma: float) -> float:
        """Expected share of weights that Gaussian noise of standard deviation ``sigma`` takes out of their cell."""
        stay = torch.special.ndtr((self.upper - self.values) / sigma) - torch.special.ndtr(
            (self.lower - self.values) / sigma
        )
        return 1 - float(stay.double().mean())

    def closed_form(self, sigma: float) -> float:
        """The same for residuals uniform in cells of these half-widths: 39.0 % where every half-width is ``sigma``."""
        return 1 - float(_share_unchanged(self.half_widths.double() / sigma).mean())


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        format: the name it was asked for.
        tensors: every tensor that will be quantized.
        sample: ``None`` unless asked for.
        has_closed_form: whether `CellSample.closed_form` holds for it: the sampled cells are equally wide within a
            block, and so many that the ends of the range hardly matter.
    """

    format: str
    tensors: tuple[TensorHalfWidth, ...]
    sample: CellSample | None = None
    has_closed_form: bool = False

    @cached_property
    def global_half_width(self) -> float:
        """Equation (4): the median over tensors of their half-width."""
        return median(tensor.half_width for tensor in self.tensors)


def calibrate(
    reader: CheckpointReader,
    format: str,
    *,
    samples: int = 0,
    progress: Progress | None = None,
    outlier_threshold: float | None = None,
) -> Calibration:
    """Median half-width of every tensor that will be quantized, and if asked for a sample of weights in their cells.

    Args:
        reader: a full-precision checkpoint.
        format: see `find_targets`.
        samples: about how many weights to sample.
        outlier_threshold: see `clip_outliers`; ``None`` measures the tensors as they are.

    Raises:
        QGuardConfigError, QGuardError, WeightError: see `find_targets`; NaN or infinite weights.
    """
    targets = find_targets(reader, format)
    total = sum(target.weights for target in targets.values())
    every = max(1, total // samples) if samples else 0
    tensors, parts, has_closed_form = [], [], bool(samples)
    for target in targets.values():
        weight = target.oriented(reader.read(target.name))
        if outlier_threshold is not None:
            weight, _ = clip_outliers(weight, target.format, outlier_threshold)
        if every:
            width, part, fine = _sample(weight, target, every)
            parts.append(part)
            has_closed_form &= fine
        else:
            width = half_width(weight, target.format, target.name)
        tensors.append(TensorHalfWidth(target.name, target.format_name, target.weights, width))
        if progress is not None:
            progress(sum(tensor.weights for tensor in tensors), total)
    sample = CellSample(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None
    return Calibration(format, tuple(tensors), sample, has_closed_form)


def name_pattern(name: str) -> str:
    """A tensor's name with its layer and expert numbers left out.

    >>> name_pattern("model.layers.3.mlp.down_proj.weight")
    'model.layers.*.mlp.down_proj.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def by_pattern(tensors: Iterable[Item]) -> dict[str, list[Item]]:
    """Anything with tensors' names, by `name_pattern`, in order of appearance."""
    groups: dict[str, list[Item]] = {}
    for tensor in tensors:
        groups.setdefault(name_pattern(tensor.name), []).append(tensor)
    return groups


def quartiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Minimum, first quartile, median, third quartile and maximum."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.linspace(0, 1, 5, dtype=torch.float64))
    return tuple(points.tolist())


def _sample(weight: Tensor, target: Target, every: int) -> tuple[float, tuple[Tensor, ...], bool]:
    """Half-width; values, lower and upper ends, half-widths of about one weight in ``every``; whether cells are equally
    wide and many."""
    format: Format = target.format
    quantized = format.quantize(weight, target.name)
    grid, codes, blocks = quantized.grid, quantized.block_codes, format.blocks(weight)
    columns = min(every, max(1, blocks.shape[1] // _SAMPLED_PER_BLOCK))
    rows = max(1, every // columns)
    chosen = slice(rows // 2 if rows < len(blocks) else 0, None, rows)
    grid, codes, values = grid[chosen], codes[chosen, ::columns], blocks[chosen, ::columns].float()
    lower, upper = grid.bounds(codes)
    last = len(grid.alphabet) - 1
    lowest = torch.where(grid.scale < 0, codes == last, codes == 0)
    highest = torch.where(grid.scale < 0, codes == 0, codes == last)
    widths = grid.half_widths(codes).expand(codes.shape)
    columns_of_sample = (
        values,
        lower.masked_fill(lowest, -torch.inf),
        upper.masked_fill(highest, torch.inf),
        widths,
    )
    fine = grid.is_uniform and len(grid.alphabet) >= _MANY_SYMBOLS
    return quantized.median_half_width(), tuple(part.flatten() for part in columns_of_sample), fine


def share_changed_at_half_width() -> float:
    """The closed form for residuals uniform in cells of half-width ``sigma``: 0.390."""
    return 1 - float(_share_unchanged(torch.ones((), dtype=torch.float64)))


def _share_unchanged(ratio: Tensor) -> Tensor:
    """Share of weights, uniform in cells of half-width ``ratio`` standard deviations, that Gaussian noise leaves there:
    the integral of ``normal_cdf(a - x) - normal_cdf(-x)`` over ``x`` from 0 to ``a = 2 ratio``, divided by ``a``."""
    width = 2 * ratio
    density = (torch.exp(-width.square() / 2) - 1) / (2 * torch.pi) ** 0.5
    stay = 2 * torch.special.ndtr(width) - 1 + 2 * density / width
    return torch.where(width > 0, stay, 0.0)
