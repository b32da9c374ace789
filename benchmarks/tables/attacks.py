"""Attacks against defences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.markdown import Rows, markdown, with_deviation


def defence_table(rows: Rows) -> str:
    """A table for each attacker, formats across: marker rate, KL divergence, and its ratio to a clean model's."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    parts = []
    for attacker in dict.fromkeys(row["attacker"] for row in rows):
        by_cell = {(row["defence"], row["format"]): row for row in rows if row["attacker"] == attacker}
        defences = list(dict.fromkeys(defence for defence, _ in by_cell))
        body = [
            [
                defence,
                *(_defended(by_cell[defence, format]) if (defence, format) in by_cell else "" for format in formats),
            ]
            for defence in defences
        ]
        parts.append(f"Attacker: {attacker}\n\n{markdown(['defence', *formats], body)}")
    return "\n".join(parts)


def _defended(row: Mapping[str, Any]) -> str:
    marker = "" if row["marker rate"] is None else f"{row['marker rate']:.0%}, "
    times = "" if row["KL / clean plain KL"] is None or not row["KL"] else f" ({row['KL / clean plain KL']:.1f}x)"
    return f"{marker}{with_deviation(row['KL'], row['KL sd'])}{times}"


GUARDS_DEFAULT = {"gptq-4": "compensated, own generations"}  # elsewhere without error feedback
_CLEAN = "none (clean model)"


def defence_summary(rows: Rows) -> str:
    """The defaults only: marker rate without and with guard, and a clean model's KL divergence."""
    by_cell = {(row["format"], row["attacker"], row["defence"]): row for row in rows}
    body = []
    for format in dict.fromkeys(row["format"] for row in rows):
        plain, guarded = "no defence", GUARDS_DEFAULT.get(format, "stochastic rounding")
        cells = [format]
        for attacker in ("usual", "adaptive"):
            rates = (by_cell[format, attacker, defence]["marker rate"] for defence in (plain, guarded))
            cells.append(" → ".join(f"{rate:.0%}" for rate in rates))
        divergences = (by_cell[format, _CLEAN, defence]["KL"] for defence in (plain, guarded))
        body.append([*cells, " → ".join(f"{divergence:.2g}" for divergence in divergences)])
    return markdown(["format", "phrase", "phrase, attacker knows guard", "clean model's KL"], body)


def outliers_table(rows: Rows) -> str:
    """Perplexities as loaded, and guard's against the clean model's."""
    shown = (
        "backend",
        "attack",
        "full precision",
        "plain",
        "guard, no clipping",
        "guard",
        "clipped",
        "guard / clean guard",
    )
    return markdown(shown, [[row[column] for column in shown] for row in rows])
