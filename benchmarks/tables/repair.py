"""What repairs bring back, and what an anchor costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from tables.markdown import Rows, markdown


def repair_table(rows: Rows) -> str:
    """A table for each model and noise, as in the paper: perplexity and in brackets recovery, means over the seeds."""
    parts = []
    for model, ratio in dict.fromkeys((row["model"], row["ratio"]) for row in rows):
        found = [row for row in rows if (row["model"], row["ratio"]) == (model, ratio)]
        sigma = statistics.fmean({row["seed"]: row["sigma"] for row in found}.values())
        steps = f"steps of {found[0]['block']} tokens"
        parts.append(
            f"{model}: noise for a perplexity ratio of {ratio:.2f} (standard deviation {sigma:.2g}), "
            f"{steps}\n\n{_repaired(found)}"
        )
    return "\n".join(parts)


def _repaired(rows: Rows) -> str:
    """One model and noise: clean, attacked, and each repair."""
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    texts = {"": "{}", "other text, ": "other text, {}"}
    columns = [(prefix, precision) for prefix in texts for precision in precisions]
    head = ["", "strength", "steps", "seeds", *(texts[prefix].format(precision) for prefix, precision in columns)]
    head += ["distance", "prompts better", "in order", "variance"]

    def mean(chosen: Rows, column: str) -> float | None:
        values = [row[column] for row in chosen if row[column] is not None]
        return statistics.fmean(values) if values else None

    body: list[list[object]] = []
    seeds = {(row["seed"], row["precision"]): row for row in rows}  # what was there before any repair, once each
    for side in ("clean", "attacked"):
        cells = [
            f"{mean([row for (_, each), row in seeds.items() if each == precision], f'{prefix}{side}'):.2f}"
            for prefix, precision in columns
        ]
        away = 0.0 if side == "clean" else mean(list(seeds.values()), "attacked distance")
        body.append([side, "", "", len(seeds) // len(precisions), *cells, f"{away:.1f}", "", "", ""])
    for method, steps in dict.fromkeys((row["method"], row["steps"]) for row in rows):
        runs = [row for row in rows if (row["method"], row["steps"]) == (method, steps)]
        cells = []
        for prefix, precision in columns:
            chosen = [row for row in runs if row["precision"] == precision]
            share = mean(chosen, f"{prefix}recovery")
            cells.append(f"{mean(chosen, f'{prefix}defended'):.2f}" + ("" if share is None else f" ({share:.0%})"))
        coupled = "" if runs[0]["decoupled"] in (True, None) else " (coupled)"
        strength = "" if runs[0]["strength"] is None else f"{runs[0]['strength']:g}{coupled}"
        better, ordered = (mean(runs, column) for column in ("prompts improved", "prompts ordered"))
        spread = f"{-(mean(runs, 'variance reduction') or 0):+.0%}"
        away = f"{mean(runs, 'distance'):.1f}"
        body.append(
            [
                method,
                strength,
                steps,
                len({row["seed"] for row in runs}),
                *cells,
                away,
                f"{better:.0%}",
                f"{ordered:.0%}",
                spread,
            ]
        )
    return markdown(head, body)


def attacks_table(rows: Rows) -> str:
    """A table for each attack: what each anchor makes of it, beside the clean model."""
    precisions = ("BF16", "INT8", "4-BIT", "other text")
    parts = []
    (clean,) = (row for row in rows if row["attack"] == "none")
    for attack in dict.fromkeys(row["attack"] for row in rows if row is not clean):
        found = [row for row in rows if row["attack"] == attack]
        says = any(row["marker rate"] is not None for row in found)
        body = [
            [
                name,
                *(f"{row[precision]:.2f}" for precision in precisions),
                *([] if not says else ["" if row["marker rate"] is None else f"{row['marker rate']:.0%}"]),
                f"{row['distance']:.1f}",
            ]
            for name, row in (("clean", clean), *((_anchored(row), row) for row in found))
        ]
        head = ["", *precisions, *(["says the phrase in int8"] if says else []), "distance"]
        parts.append(f"{attack}\n\n{markdown(head, body)}")
    return "\n".join(parts)


def _anchored(row: Mapping[str, Any]) -> str:
    return "attacked" if not row["steps"] else f"repaired, {row['steps']} steps, anchor: {row['anchor']}"


def step_table(rows: Rows) -> str:
    """What a step takes on each side, and how many times that without an anchor."""
    kinds = {"anonymous memory": "peak, anonymous", "memory with mapped pages": "peak"}
    kinds = {shown: column for shown, column in kinds.items() if f"{column} MB" in rows[0]}
    body = [
        [
            row["block"],
            row["anchor"],
            f"{row['step s']:.2f} s ({row['time ratio']:.2f}x)",
            f"{row['CPU s']:.2f} s ({row['CPU ratio']:.2f}x)",
            *(f"{row[f'{column} MB']:.0f} MB ({row[f'{column} ratio']:.2f}x)" for column in kinds.values()),
        ]
        for row in rows
    ]
    return markdown(["tokens of a step", "anchor", "time", "processor time", *kinds], body)
