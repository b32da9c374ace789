"""Markdown tables, and how figures are written in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def full_table(rows: Rows) -> str:
    """Every column as it is."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def markdown(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *([text(cell) for cell in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text(cell: object) -> str:
    """A cell: numbers with three digits."""
    text = "" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|")


def with_deviation(mean: float, deviation: float | None) -> str:
    """Mean and standard deviation with the decimals that show three digits of the mean."""
    decimals = next((decimals for decimals in range(5) if abs(mean) >= 10 ** (2 - decimals)), 5)
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")
