"""What undoes protection without its key: recipes of `optimum_qguard.attacks.rebalance`, each then quantized.

KL divergence to the original at full precision, of what exact and dense mode make of it and of the original itself,
after the same recipe in the same quantizer. Where the two are near each other, the recipe undoes the protection.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from divergence import KEY, STRONG_A, Reference, divergence_parser
from harness import earlier_rows, print_table, today, write

from optimum_qguard.attacks.fine_tuning import fine_tune_checkpoint
from optimum_qguard.attacks.rebalance import rebalance_checkpoint
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.evaluate import standard_library_text

FORMATS = ("bnb-int8", "torchao-int8", "bnb-nf4", "torchao-int4")
ORIGINAL = "original"
MODES: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "dense": {"mode": "dense"},
    "dense, kappa 1024 in all layers": {"mode": "dense", "conditioning": STRONG_A},
}
FINE_TUNING = "fine-tuning"
_TEXT_CHARACTERS = 16_000  # enough for calibrating and for fine-tuning
# Each with who would do it: a standard pipeline, or somebody who knows how the model was protected.
RECIPES: Mapping[str, tuple[str, Sequence[str]]] = {
    "none": ("standard", []),
    "SmoothQuant": ("standard", ["smoothquant"]),
    "AWQ": ("standard", ["awq"]),
    "cross-layer equalization": ("standard", ["equalization"]),
    "norm fusing, rotated heads": ("standard", ["fuse-norms", "rotate-heads"]),
    "fine-tuning": ("standard", [FINE_TUNING]),
    "norm fusing, equalization, rotated heads": ("combined", ["fuse-norms", "equalization", "rotate-heads"]),
    "AWQ with grouped values": ("informed", ["awq-grouped"]),
    "powers of two": ("informed", ["power-of-two"]),
    "powers of two, SVD of heads": ("informed", ["power-of-two", "svd"]),
}


def main() -> None:
    """Measure, print and write."""
    parser = divergence_parser("undo", __doc__, FORMATS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--resume", action="store_true", help="keep the rows of other recipes that --output has")
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    reference = Reference(arguments.model, arguments.tokens, arguments.device)
    text = standard_library_text(_TEXT_CHARACTERS, "training")
    kept = earlier_rows(arguments.output) if arguments.resume else []
    rows: list[dict[str, object]] = [row for row in kept if row["recipe"] not in arguments.recipes]
    with TemporaryDirectory() as folder:
        models = {ORIGINAL: Path(arguments.model)}
        for mode, options in MODES.items():
            models[mode] = Path(folder) / mode
            encrypt_checkpoint(arguments.model, models[mode], key=KEY, **options)
        for recipe in arguments.recipes:
            who, steps = RECIPES[recipe]
            found = {}
            for name, model in models.items():
                out = Path(folder) / "out"
                if steps == [FINE_TUNING]:
                    fine_tune_checkpoint(model, out, text=text, overwrite=True)
                else:
                    rebalance_checkpoint(model, out, steps, text=text, max_tokens=arguments.tokens, overwrite=True)
                found[name] = {format: reference.kl(out, format) for format in (None, *arguments.formats)}
            for mode in MODES:
                row: dict[str, object] = {"recipe": recipe, "who": who, "mode": mode, "BF16": found[mode][None]}
                for format in arguments.formats:
                    row |= {format: found[mode][format], f"{format}, original": found[ORIGINAL][format]}
                rows.append({**row, "date": today()})
            rows.sort(key=lambda row: list(RECIPES).index(str(row["recipe"])))
            write("undo", rows, arguments.output)
    print_table(rows)


if __name__ == "__main__":
    main()
