"""Widths: quality, speed, memory, training, attacks on the input."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tables.markdown import Rows, markdown


def precision_table(rows: Rows) -> str:
    """A table for each model and attack: defences down, F1 under each attacker across, with intervals."""
    attackers, strongest = ("full precision", "the defended model", "all its widths"), "what hurts most"
    parts = []
    for model, attack in dict.fromkeys((row["model"], row["attack"]) for row in rows):
        here = [row for row in rows if (row["model"], row["attack"]) == (model, attack)]
        by_cell = {(row["defence"], row["attacker uses"]): row for row in here}
        body = []
        for defence in dict.fromkeys(row["defence"] for row in here):
            worst = by_cell[defence, strongest]
            found = [by_cell.get((defence, attacker)) for attacker in attackers]
            attacked = ["" if row is None else with_interval(row, "adversarial F1") for row in found]
            difference = with_interval(worst, "adversarial F1 - static 8-bit")
            body.append([defence, with_interval(worst, "clean F1"), *attacked, difference])
        head = ["defence", "clean", *(f"attacked by the gradients of {attacker}" for attacker in attackers)]
        parts.append(
            f"{model}, {attack}, {here[0]['questions']} questions: F1 and its 95 % interval\n\n"
            f"{markdown([*head, 'under what hurts most, less that of static 8-bit'], body)}"
        )
    return "\n".join(parts)


def with_interval(row: Mapping[str, Any], column: str) -> str:
    """The estimate and its interval, of the columns that are called so, and ``low`` and ``high``."""
    if row[column] is None:
        return ""
    return f"{row[column]:.3f} [{row[f'{column} low']:.3f}, {row[f'{column} high']:.3f}]"


def nested_quality_table(rows: Rows) -> str:
    """KL divergence of the nested width, and of the others to compare with."""
    head = ["bits", "nested", "quantized directly", "ratio", "symmetric", "nested, uncorrected", "perplexity"]
    body = [
        [
            row["bits"],
            row["nested KL"],
            row["direct KL"],
            f"{row['nested KL / direct KL']:.2f}",
            row["symmetric KL"],
            row["nested, no lines KL"],
            f"{row['nested perplexity']:.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    return (
        f"KL divergence to full precision, nats per token ({first['tokens']} tokens, groups of {first['group size']} "
        f"weights; perplexity at full precision: {first['full perplexity']:.2f}):\n\n{markdown(head, body)}"
    )


def nested_speed_table(rows: Rows) -> str:
    """A table for each subject: times, and in brackets their ratio to float32's."""
    parts = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        body = [
            [
                row["weights"],
                row["bits"],
                f"{row['held MB']:.0f}",
                *(f"{row[f'{kind} ms']:.1f} ({row[f'{kind} / float32']:.2f}x)" for kind in ("prompt", "token")),
                f"{row['token / reading']:.1f}x",
            ]
            for row in rows
            if row["subject"] == subject
        ]
        head = ["weights", "bits", "MB", "prompt of 128, ms", "one token, ms", "one token / reading its bytes"]
        parts.append(f"{subject}\n\n{markdown(head, body)}")
    return "\n".join(parts)


def nested_memory_table(rows: Rows) -> str:
    """Megabytes and milliseconds."""
    head = ["", "widths", "MB", "peak of loading, MB", "to another width, ms"]
    columns = ("held MB", "peak of loading MB", "to another width ms")
    return markdown(head, [[row["held"], row["widths"], *(_short(row[column]) for column in columns)] for row in rows])


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def allocation_table(rows: Rows) -> str:
    """A table for each model: maps down, their divergence and the allocated map's."""
    shown = {
        "bits": "average bits",
        "KL": "KL divergence",
        "allocated KL": "allocated: KL divergence",
        "allocated KL / KL": "ratio",
        "perplexity": "perplexity",
        "allocated perplexity": "allocated: perplexity",
    }
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        body = [[row["map"], *(row[column] for column in shown)] for row in rows if row["model"] == model]
        parts.append(f"{model}\n\n{markdown(['map', *shown.values()], body)}")
    return "\n".join(parts)


def cyclic_table(rows: Rows) -> str:
    """Ways of training down, F1 at each width across in percent: means over seeds, and the lowest and highest."""
    columns = [column for column in rows[0] if column.startswith("F1")]
    body: list[list[object]] = []
    for way in dict.fromkeys(row["way"] for row in rows):
        runs = [row for row in rows if row["way"] == way]
        body.append([way, len(runs), *(_percent([row[column] for row in runs]) for column in columns)])
    head = [
        "trained",
        "seeds",
        *(f"{column} bits" if column[-1].isdigit() else f"{column} precision" for column in columns),
    ]
    return f"{rows[0]['questions']} questions, {rows[0]['steps']} steps\n\n{markdown(head, body)}"


def _percent(values: Sequence[float]) -> str:
    spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
