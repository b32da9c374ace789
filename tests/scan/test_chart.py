"""Plots as drawings."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_qguard.scan.chart import HEIGHT, WIDTH, Chart, chart
from optimum_qguard.scan.finding import Plot

NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8)


def plot(kind: Any = "bars", **values: Any) -> Plot:
    return Plot(detector="detector", title="title", kind=kind, x_label="x", y_label="y", **values)


def places(chart: Chart) -> list[tuple[float, float]]:
    found = [(bar.x + side * bar.width, bar.y + side * bar.height) for bar in chart.bars for side in (0, 1)]
    found += [(point.x, point.y) for point in chart.points]
    found += [(tick.at, chart.bottom) for tick in chart.x_ticks] + [(chart.left, tick.at) for tick in chart.y_ticks]
    lines = f"{chart.line} {chart.expected}".split()
    return found + [(float(x), float(y)) for x, y in (point.split(",") for point in lines)] + [(chart.left, chart.zero)]


@given(kind=st.sampled_from(["bars", "line"]), x=NUMBERS, y=NUMBERS, expected=st.none() | NUMBERS)
def test_everything_is_inside(kind: str, x: list[float], y: list[float], expected: list[float] | None) -> None:
    """Whatever the numbers are."""
    drawn = chart(plot(kind, x=x, y=y, expected=expected))
    assert len(drawn.bars) + len(drawn.points) == min(len(x), len(y))
    assert all(bar.width >= 0 and bar.height >= 0 for bar in drawn.bars)
    for across, down in places(drawn):
        assert drawn.left - 0.1 <= across <= drawn.right + 0.1 <= WIDTH
        assert drawn.top - 0.1 <= down <= drawn.bottom + 0.1 <= HEIGHT
    assert 1 <= len(drawn.x_ticks) <= 8
    assert 1 <= len(drawn.y_ticks) <= 8


@given(y=st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_heights_are_the_numbers(y: list[float]) -> None:
    drawn = chart(plot(x=[*range(len(y))], y=y))
    scale = (drawn.bottom - drawn.top) / ((max(0, *y) - min(0, *y)) or math.inf)
    for bar, value in zip(drawn.bars, y, strict=True):
        if max(map(abs, y)) > 1e-6:
            assert bar.height == pytest.approx(abs(value) * scale, abs=0.02)
            assert bar.y + (bar.height if value > 0 else 0) == pytest.approx(drawn.zero, abs=0.02)


def test_ticks_are_round() -> None:
    drawn = chart(plot("line", x=[0.0, 29.0], y=[0.0, 0.93]))
    assert [tick.label for tick in drawn.x_ticks] == ["0", "10", "20"]
    assert [tick.label for tick in drawn.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8"]


def test_what_is_said_of_a_bar() -> None:
    (first, second) = chart(plot(x=[0.5, 1.5], y=[2.0, 3.25], expected=[1.0])).bars
    assert first.title == "x 0.5: y 2 (1 in a clean checkpoint)"
    assert second.title == "x 1.5: y 3.25"
