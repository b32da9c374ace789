"""Where the marks of a `Plot` stand in a drawing; the page's template draws them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from optimum_qguard.scan.finding import Plot

WIDTH, HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 42
_TICKS = 5
_LARGEST = 1e100


@dataclass(frozen=True)
class Bar:
    """A rectangle, and what is said of it when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Point:
    """Of a line."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Tick:
    """On an axis: where, and its number."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` x `HEIGHT`, y downwards.

    Attributes:
        left, right, top, bottom: of the axes.
        zero: the height of 0, where bars stand.
        bars: of a plot of bars; ``points`` and ``line`` (``x,y x,y …``) of one of a line.
        expected: the line of a clean checkpoint; empty if it is not known.
    """

    plot: Plot
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    zero: float
    bars: list[Bar]
    points: list[Point]
    line: str
    expected: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def chart(plot: Plot) -> Chart:
    """The drawing of a plot."""
    count = min(len(plot.x), len(plot.y))
    xs, ys = _bounded(plot.x[:count]), _bounded(plot.y[:count])
    expected = _bounded((plot.expected or [])[:count])
    half = min((b - a for a, b in itertools.pairwise(xs) if b > a), default=1.0) / 2
    margin = half if plot.kind == "bars" else 0.0
    x_low, x_high = _range(xs, margin)
    y_low, y_high = _range([0.0, *ys, *expected], 0.0)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT), 2)

    def up(y: float) -> float:
        return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP), 2)

    titles = [f"{plot.x_label} {x:.4g}: {plot.y_label} {y:.4g}" for x, y in zip(xs, ys, strict=True)]
    titles = [
        f"{title} ({expected[index]:.4g} in a clean checkpoint)" if index < len(expected) else title
        for index, title in enumerate(titles)
    ]
    bars, points, line = [], [], ""
    if plot.kind == "bars":
        for x, y, title in zip(xs, ys, titles, strict=True):
            left, top = across(x - half), min(up(y), up(0))
            bars.append(Bar(left, top, round(across(x + half) - left, 2), round(abs(up(y) - up(0)), 2), title))
    else:
        points = [Point(across(x), up(y), title) for x, y, title in zip(xs, ys, titles, strict=True)]
        line = " ".join(f"{point.x},{point.y}" for point in points)
    return Chart(
        plot=plot,
        x_ticks=[Tick(across(value), f"{value:.4g}") for value in _ticks(x_low, x_high)],
        y_ticks=[Tick(up(value), f"{value:.4g}") for value in _ticks(y_low, y_high)],
        zero=up(0),
        bars=bars,
        points=points,
        line=line,
        expected=" ".join(f"{across(x)},{up(y)}" for x, y in zip(xs, expected, strict=False)),
    )


def _bounded(values: list[float]) -> list[float]:
    """So that differences neither overflow nor vanish; no such number is drawn but in an attack."""
    return [max(-_LARGEST, min(_LARGEST, value)) if abs(value) > 1 / _LARGEST else 0.0 for value in values]


def _range(values: list[float], margin: float) -> tuple[float, float]:
    """Where an axis begins and ends, never both at the same place."""
    low, high = min(values, default=0.0) - margin, max(values, default=0.0) + margin
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size == 0:
        return low - (size / 2 or 0.5), high + (size / 2 or 0.5)
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about `_TICKS` of them."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
