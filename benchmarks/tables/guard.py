"""What guard costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tables.markdown import Rows, markdown, with_deviation


def load_table(rows: Rows) -> str:
    """Ratios first; the two sides' seconds and megabytes share a column each."""
    head = ["model", "backend", "method", "time", "peak memory", "seconds", "peak MB"]
    return markdown(
        head,
        [
            [
                row["model"],
                row["backend"],
                row["method"],
                f"{row['time ratio']:.2f}x",
                f"{row['peak ratio']:.2f}x",
                f"{row['plain s']:.2f} → {row['guarded s']:.2f}",
                f"{row['plain peak MB']:.0f} → {row['guarded peak MB']:.0f}",
            ]
            for row in rows
        ],
    )


def quality_table(rows: Rows) -> str:
    """Backends down, methods across, for KL divergence and then for perplexity."""
    quantized = [row for row in rows if row["method"]]
    reference = next(row for row in rows if not row["method"])
    methods = list(dict.fromkeys(row["method"] for row in quantized))
    backends = list(dict.fromkeys(row["backend"] for row in quantized))
    by_cell = {(row["backend"], row["method"]): row for row in quantized}

    def pivot(cell: Callable[[Mapping[str, Any]], str]) -> str:
        body = [
            [
                backend,
                *(cell(by_cell[backend, method]) if (backend, method) in by_cell else "" for method in methods),
            ]
            for backend in backends
        ]
        return markdown(["backend", *methods], body)

    def divergence(row: Mapping[str, Any]) -> str:
        times = "" if row["KL / plain KL"] in (None, 1) else f" ({row['KL / plain KL']:.1f}x)"
        return with_deviation(row["KL"], row["KL sd"]) + times

    return (
        f"KL divergence to full precision, nats per token, and its ratio to plain quantization's "
        f"({reference['model']}, {reference['tokens']} tokens):\n\n{pivot(divergence)}\n"
        f"Perplexity (full precision: {reference['perplexity']:.2f}):\n\n"
        f"{pivot(lambda row: with_deviation(row['perplexity'], row['perplexity sd']))}"
    )
