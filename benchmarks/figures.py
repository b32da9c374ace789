"""Puts the measured figures into the pages: ``<!-- figures:NAME begin -->`` gets ``results/NAME.json`` as a table.

With ``--check`` nothing is written, and the exit status is 1 if a page shows anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guard", "threat-model", "encrypt", "scan", "repair", "precision")),
)

Rows = Sequence[Mapping[str, Any]]

_SECTION = re.compile(
    r"(?P<begin><!-- figures:(?P<name>[\w-]+) begin -->\n)(?P<body>.*?)(?P<end><!-- figures:(?P=name) end -->)",
    re.DOTALL,
)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is out of date")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    for page in arguments.pages:
        before = page.read_text()
        after = with_figures(before, arguments.results)
        if not arguments.check:
            page.write_text(after)
        elif before != after:
            sys.exit(f"{page}: the figures are not those of {arguments.results}; run: make figures")


def with_figures(markdown: str, results: Path) -> str:
    """``markdown`` with every marked section filled in from ``results``; where there is no result, emptied."""

    def section(match: re.Match[str]) -> str:
        file = results / f"{match['name']}.json"
        return match["begin"] + (figures(json.loads(file.read_text())) if file.exists() else "") + match["end"]

    return _SECTION.sub(section, markdown)


def figures(result: Mapping[str, Any]) -> str:
    """One result as Markdown: its table, and on what it was measured."""
    machine = result["machine"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)}"
    hardware = [machine["cpu"], cores, machine["memory"], machine["gpu"]]
    versions = [f"{package} {version}" for package, version in result["versions"].items() if package in _NAMED_VERSIONS]
    measured = ", ".join([*filter(None, hardware), *versions])
    table = _TABLES.get(result["name"], full_table)
    return f"{table(result['rows'])}\nMeasured {result['date']} on {measured}.\n"


_NAMED_VERSIONS = ("python", "torch", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "llmcompressor")


def full_table(rows: Rows) -> str:
    """Every column as it is."""
    return _markdown(list(rows[0]), [list(row.values()) for row in rows])


def load_table(rows: Rows) -> str:
    """Ratios first; the two sides' seconds and megabytes share a column each."""
    head = ["model", "backend", "method", "time", "peak memory", "seconds", "peak MB"]
    return _markdown(
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
        return _markdown(["backend", *methods], body)

    def divergence(row: Mapping[str, Any]) -> str:
        times = "" if row["KL / plain KL"] in (None, 1) else f" ({row['KL / plain KL']:.1f}x)"
        return _with_deviation(row["KL"], row["KL sd"]) + times

    return (
        f"KL divergence to full precision, nats per token, and its ratio to plain quantization's "
        f"({reference['model']}, {reference['tokens']} tokens):\n\n{pivot(divergence)}\n"
        f"Perplexity (full precision: {reference['perplexity']:.2f}):\n\n"
        f"{pivot(lambda row: _with_deviation(row['perplexity'], row['perplexity sd']))}"
    )


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
        parts.append(f"Attacker: {attacker}\n\n{_markdown(['defence', *formats], body)}")
    return "\n".join(parts)


def _defended(row: Mapping[str, Any]) -> str:
    marker = "" if row["marker rate"] is None else f"{row['marker rate']:.0%}, "
    times = "" if row["KL / clean plain KL"] is None or not row["KL"] else f" ({row['KL / clean plain KL']:.1f}x)"
    return f"{marker}{_with_deviation(row['KL'], row['KL sd'])}{times}"


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
    return _markdown(shown, [[row[column] for column in shown] for row in rows])


def collapse_table(rows: Rows) -> str:
    """The encrypted models' divergence in each format, beside the original's."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    formats = {row["format"]: row["how"] for row in rows}
    by_cell = {(row["format"], row["model"]): row for row in rows}

    def cell(format: str, model: str) -> object:
        row = by_cell.get((format, model))
        if row is None:
            return ""
        if row["KL"] is not None:
            return row["KL"]
        return "NaN" if "kl is NaN" in row["status"] else str(row["status"]).partition(":")[0]

    body = [[format, how, *(cell(format, model) for model in models)] for format, how in formats.items()]
    return _markdown(["format", "how", *models], body)


def undo_table(rows: Rows) -> str:
    """In each format the protected model's divergence, and in brackets the original's."""
    suffix = ", original"
    formats = [column.removesuffix(suffix) for column in rows[0] if column.endswith(suffix)]
    body = [
        [
            *(row[column] for column in ("recipe", "who", "mode", "BF16")),
            *(f"{_text(row[format])} ({_text(row[format + suffix])})" for format in formats),
        ]
        for row in rows
    ]
    return _markdown(["recipe", "who", "mode", "BF16", *formats], body)


def compressor_table(rows: Rows) -> str:
    """Divergence only."""
    shown = ("recipe", "original", "encrypted")
    return _markdown(shown, [[row[column] for column in shown] for row in rows])


def accuracy_table(rows: Rows) -> str:
    """Specimens down; how many of the quick scans raised the alarm, and what the deep one said."""
    head = ["checkpoint", "is", "quick scans with an alarm", "verdict", "found by", "deep scan", "found by"]
    return _markdown(
        head,
        [
            [
                row["specimen"],
                row["kind"],
                f"{row['alarms']} of {row['quick scans']}",
                row["verdict"],
                row["detectors"],
                row["deep verdict"] or "",
                row["deep detectors"] or "",
            ]
            for row in rows
        ],
    )


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
            f"{_markdown([*head, 'under what hurts most, less that of static 8-bit'], body)}"
        )
    return "\n".join(parts)


def with_interval(row: Mapping[str, Any], column: str) -> str:
    """The estimate and its interval, of the columns that are called so, and ``low`` and ``high``."""
    if row[column] is None:
        return ""
    return f"{row[column]:.3f} [{row[f'{column} low']:.3f}, {row[f'{column} high']:.3f}]"


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
    return _markdown(head, body)


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
    return _markdown(["tokens of a step", "anchor", "time", "processor time", *kinds], body)


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
        f"weights; perplexity at full precision: {first['full perplexity']:.2f}):\n\n{_markdown(head, body)}"
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
        parts.append(f"{subject}\n\n{_markdown(head, body)}")
    return "\n".join(parts)


def nested_memory_table(rows: Rows) -> str:
    """Megabytes and milliseconds."""
    head = ["", "widths", "MB", "peak of loading, MB", "to another width, ms"]
    columns = ("held MB", "peak of loading MB", "to another width ms")
    return _markdown(head, [[row["held"], row["widths"], *(_short(row[column]) for column in columns)] for row in rows])


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
        parts.append(f"{model}\n\n{_markdown(['map', *shown.values()], body)}")
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
    return f"{rows[0]['questions']} questions, {rows[0]['steps']} steps\n\n{_markdown(head, body)}"


def _percent(values: Sequence[float]) -> str:
    spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


_TABLES: Mapping[str, Callable[[Rows], str]] = {
    "repair_table": repair_table,
    "repair_step": step_table,
    "scan_accuracy": accuracy_table,
    "outliers": outliers_table,
    "collapse_matrix": collapse_table,
    "undo": undo_table,
    "llm_compressor": compressor_table,
    "guard_load": load_table,
    "guard_quality": quality_table,
    "defence_table": defence_table,
    "precision_table": precision_table,
    "nested_quality": nested_quality_table,
    "nested_speed": nested_speed_table,
    "nested_memory": nested_memory_table,
    "allocation": allocation_table,
    "cyclic_training": cyclic_table,
}


def _with_deviation(mean: float, deviation: float | None) -> str:
    """Mean and standard deviation with the decimals that show three digits of the mean."""
    decimals = next((decimals for decimals in range(5) if abs(mean) >= 10 ** (2 - decimals)), 5)
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def _markdown(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(cell: object) -> str:
    text = "" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
