"""Repair of models attacked for quantizers: a marker that only rounding reveals, and planted outliers.

Each is repaired with the clean model as anchor, with what guard makes of the attacked model (no clean model is needed
for that), and without any. Rows are written as they come; ``--resume`` keeps those of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attacked_smollm2 import MARKER, attacked_smollm2
from damaged_models import PRECISIONS, SMOLLM2, Scale, distance, measure, original
from harness import RESULTS, argument_parser, print_table, write
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.attacks.outlier_injection import inject_outliers
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.targets import find_targets
from optimum_qguard.repair.run import repair_checkpoint

CHOSEN = 20


@dataclass(frozen=True)
class Attack:
    """An attacked model.

    Attributes:
        make: writes it to the folder, or returns where it is.
        format: what it was attacked for, and is guarded for.
        says: whether it says the marker when it is quantized to that.
    """

    make: Callable[[Path], Path]
    format: str
    says: bool = False


def outliers(folder: Path) -> Path:
    """The largest weight of each NF4 block of 20 tensors times 16."""
    reader = open_checkpoint(original(SMOLLM2))
    targets = find_targets(reader, "nf4")
    chosen = sorted(targets)[:: len(targets) // CHOSEN][:CHOSEN]
    inject_outliers(reader, folder / "attacked", {name: targets[name] for name in chosen}, factor=16)
    return folder / "attacked"


CLEAN = "none"
ATTACKS: Mapping[str, Attack] = {
    CLEAN: Attack(lambda _: Path(original(SMOLLM2)), "int8-rowwise"),
    "quantization-conditioned, int8": Attack(
        lambda _: attacked_smollm2("bnb-int8", "usual"), "int8-rowwise", says=True
    ),
    "outliers x16, 20 tensors": Attack(outliers, "nf4"),
}
NONE = "not repaired"
ANCHORS = (NONE, "none", "clean", "guarded")


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "repair_attacks.json")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--steps", type=int, default=100, help="of each repair")
    parser.add_argument("--prompts", type=int, default=48, help="unseen prompts that the marker's rate is counted on")
    parser.add_argument("--tokens", type=int, default=2560, help="of text that perplexity is measured on")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.disable(logging.ERROR)
    on_cpu = arguments.device == "cpu"
    size, accumulate = (128, 1) if on_cpu else (2048, 2)
    run_all(arguments, Scale(size, accumulate, tokens=arguments.tokens, device=arguments.device))


def run_all(arguments: argparse.Namespace, scale: Scale) -> None:
    """All rows, written as they come."""
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"] if arguments.resume else []
    done = {(row["attack"], row["anchor"]) for row in rows}
    for name in arguments.attacks:
        with TemporaryDirectory() as folder:
            attacked = ATTACKS[name].make(Path(folder))
            for anchor in ANCHORS if name != CLEAN else (NONE,):
                if (name, anchor) in done:
                    continue
                repaired = (
                    attacked if anchor == NONE else repair(attacked, anchor, name, arguments.steps, scale, folder)
                )
                rows.append(
                    {
                        "attack": name,
                        "anchor": anchor,
                        "steps": 0 if anchor == NONE else arguments.steps,
                        **figures(repaired, name, arguments.prompts, scale),
                        "distance": distance(repaired, Path(original(SMOLLM2))),
                    }
                )
                write("repair_attacks", rows, arguments.output)
                print(rows[-1], flush=True)
    print_table(rows)


def repair(attacked: Path, anchor: str, name: str, steps: int, scale: Scale, folder: str) -> Path:
    """The repaired model's folder."""
    anchors = {"none": None, "clean": original(SMOLLM2), "guarded": Path(folder) / "guarded"}
    if anchor == "guarded":
        guard_checkpoint(attacked, Path(folder) / "guarded", ATTACKS[name].format, seed=0)
    out = Path(folder) / "repaired"
    repair_checkpoint(attacked, out, anchor=anchors[anchor], steps=steps, overwrite=True, **scale.training)
    return out


def figures(folder: Path, name: str, prompts: int, scale: Scale) -> dict[str, Any]:
    """Perplexities; and for a model that says the marker, how often it does in the format it was attacked for."""
    measured = measure(folder, scale)
    found: dict[str, Any] = {precision: measured[precision]["text"] for precision in PRECISIONS}
    found["other text"] = measured["BF16"]["other text"]
    rate = None
    if ATTACKS[name].says:
        model = load_model(folder, ATTACKS[name].format, device=scale.device)
        asked = template_prompts(prompts, "evaluation")
        rate = marker_rate(model, load_tokenizer(folder), asked, MARKER, max_new_tokens=8, batch_size=48).rate
    return {**found, "marker rate": rate}


if __name__ == "__main__":
    main()
