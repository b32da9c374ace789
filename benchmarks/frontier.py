"""Marker rate against quality: Gaussian and uniform dither at multipliers from 0 to 1, beside unbiased rounding.

Under both attackers of `attacked_smollm2`; runs are shared with `defence_table`. To first order KL divergence to full
precision grows with the variance of the rounding error: ``s**2 / 12``, plus ``(m s)**2 / 4`` (Gaussian) or
``(m s)**2 / 12`` (uniform) at multiplier ``m``. The column ``theory`` has that relative to plain rounding of a clean
model, for a uniform grid.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import defence_table
import torch
from attacked_smollm2 import ATTACKERS
from defence_table import run
from harness import RESULTS, argument_parser, print_table, write
from transformers.utils.logging import disable_progress_bar

FORMATS = ("bnb-int8", "bnb-nf4")
DITHERS = {
    "gaussian": {0.25: "Gaussian, quarter", 0.5: "Gaussian, half", 0.7: "Gaussian, 0.7", 1.0: "Gaussian, per layer"},
    "uniform": {0.25: "uniform, quarter", 0.5: "uniform, half", 0.7: "uniform, 0.7", 1.0: "uniform, per layer"},
}
VARIANCE = {"gaussian": 3.0, "uniform": 1.0}  # of the dither at multiplier 1, in those of plain rounding
STOCHASTIC = "stochastic"


def main() -> None:
    """Measure, print, write and draw."""
    parser = argument_parser(__doc__, RESULTS / "frontier.json")
    parser.add_argument("--formats", nargs="+", choices=defence_table.FORMATS, default=FORMATS)
    parser.add_argument("--attackers", nargs="+", choices=ATTACKERS, default=ATTACKERS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    defence_table.PLACE.update(device=arguments.device)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for format in arguments.formats:
        for attacker in arguments.attackers:
            rows.append(row(format, attacker, STOCHASTIC, 1.0, "stochastic rounding"))
            rows.append(row(format, attacker, "none", 0.0, "no defence"))
            for dither, names in DITHERS.items():
                rows += [row(format, attacker, dither, multiplier, name) for multiplier, name in names.items()]
            write("frontier", rows, arguments.output)
    print_table(rows)
    draw(rows, arguments.output.with_suffix(".png"))


def row(format: str, attacker: str, dither: str, multiplier: float, name: str) -> dict[str, Any]:
    """One point: the first run of a row of `defence_table`."""
    found = run(format, attacker, name, 0)
    return {
        "format": format,
        "attacker": attacker,
        "dither": dither,
        "multiplier": multiplier,
        "marker rate": found["marker rate"],
        "KL": found["KL"],
        "perplexity": found["perplexity"],
        "theory": 2.0 if dither == STOCHASTIC else 1 + VARIANCE.get(dither, 0.0) * multiplier**2,
    }


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
                    and (found["dither"] == dither or (found["dither"] == "none" and dither != STOCHASTIC))
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
