"""Marker rate against quality: Gaussian and uniform dither at multipliers from 0 to 1, beside unbiased rounding.

Under both attackers of `attacked_smollm2`. To first order KL divergence to full precision grows with the variance of
the rounding error: ``s**2 / 12``, plus ``(m s)**2 / 4`` (Gaussian) or ``(m s)**2 / 12`` (uniform) at multiplier ``m``.
The column ``theory`` has that relative to plain rounding of a clean model, for a uniform grid.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import defence_table
import torch
from attacked_smollm2 import ATTACKERS
from defence_table import folder_of, judge_of, load
from harness import RESULTS, argument_parser, print_table, write
from transformers.utils.logging import disable_progress_bar

FORMATS = ("bnb-int8", "bnb-nf4")
MULTIPLIERS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
VARIANCE = {"gaussian": 3.0, "uniform": 1.0}  # of the dither at multiplier 1, in those of plain rounding
STOCHASTIC = "stochastic"


def main() -> None:
    """Measure, print, write and draw."""
    parser = argument_parser(__doc__, RESULTS / "frontier.json")
    parser.add_argument("--formats", nargs="+", choices=defence_table.FORMATS, default=FORMATS)
    parser.add_argument("--attackers", nargs="+", choices=ATTACKERS, default=ATTACKERS)
    parser.add_argument("--multipliers", nargs="+", type=float, default=MULTIPLIERS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for format in arguments.formats:
        for attacker in arguments.attackers:
            rows += [row(format, attacker, STOCHASTIC, 1.0)]
            rows += [row(format, attacker, dither, m) for dither in VARIANCE for m in arguments.multipliers if m]
            rows += [row(format, attacker, "gaussian", 0.0)] if 0.0 in arguments.multipliers else []
            write("frontier", rows, arguments.output)
    print_table(rows)
    draw(rows, arguments.output.with_suffix(".png"))


def row(format: str, attacker: str, dither: str, multiplier: float) -> dict[str, Any]:
    """One point."""
    options = {"method": dither, "multiplier": multiplier, "seed": 0}
    if dither == STOCHASTIC:
        options = {"seed": 0}
    judge = judge_of(format, attacker)
    model = load(folder_of(format, attacker), format, options if multiplier else None)
    perplexity, kl = judge.quality(model)
    found = {
        "format": format,
        "attacker": attacker,
        "dither": dither,
        "multiplier": multiplier,
        "marker rate": judge.marker(model, "evaluation"),
        "KL": kl,
        "perplexity": perplexity,
        "theory": 2.0 if dither == STOCHASTIC else 1 + VARIANCE[dither] * multiplier**2,
    }
    print(found, flush=True)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a format: KL divergence across, marker rate up."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    formats = list(dict.fromkeys(found["format"] for found in rows))
    figure, panels = plt.subplots(1, len(formats), figsize=(6 * len(formats), 4.2), squeeze=False)
    colours = {"gaussian": "#c0392b", "uniform": "#2f6db3", STOCHASTIC: "#1e8449"}
    for panel, format in zip(panels[0], formats, strict=True):
        for attacker, style in zip(ATTACKERS, ("-", "--"), strict=True):
            for dither, colour in colours.items():
                points = [
                    found
                    for found in rows
                    if (found["format"], found["attacker"]) == (format, attacker)
                    and (found["dither"] == dither or (not found["multiplier"] and dither != STOCHASTIC))
                ]
                points.sort(key=lambda found: found["multiplier"])
                marker = "*" if dither == STOCHASTIC else "o"
                panel.plot(
                    [found["KL"] for found in points],
                    [100 * found["marker rate"] for found in points],
                    style,
                    color=colour,
                    marker=marker,
                    markersize=14 if dither == STOCHASTIC else 5,
                    label=f"{dither}, {attacker} attacker",
                )
                for found in points:
                    if dither != STOCHASTIC and attacker == ATTACKERS[-1]:
                        where = (found["KL"], 100 * found["marker rate"])
                        panel.annotate(
                            f"{found['multiplier']:g}", where, (4, 4), textcoords="offset points", color=colour
                        )
        panel.set(title=format, xlabel="KL divergence to full precision (nats per token)", ylabel="marker rate (%)")
        panel.set_ylim(-4, 104)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
