"""The ablation that the paper says it lacks: mechanisms A, B and C alone and together, at full precision and quantized.

A: ill-conditioning, B: residue, C: scaling traps, each with its defaults; and A and B much stronger than theirs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from divergence import KEY, STRONG_A, Reference, divergence_parser
from harness import print_table, write
from torch import Tensor

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.writer import transform_checkpoint
from optimum_qguard.encrypt.architectures import find_sites
from optimum_qguard.encrypt.change import Change, changes
from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.residue import Residue
from optimum_qguard.encrypt.traps import Traps

FORMATS = ("bnb-int8", "bnb-nf4", "torchao-int8", "quanto-float8", "mxfp4")
A, B, C = Conditioning(), Residue(), Traps()
STRONG_B = Residue(32.0, 32.0, rank=8, every=1)
MECHANISMS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "A": {"conditioning": A},
    "B": {"residue": B},
    "C": {"traps": C},
    "A + B": {"conditioning": A, "residue": B},
    "A + C": {"conditioning": A, "traps": C},
    "B + C": {"residue": B, "traps": C},
    "A + B + C": {"conditioning": A, "residue": B, "traps": C},
    "A, kappa 1024 in all layers": {"conditioning": STRONG_A},
    "B, epsilon 32, rank 8 in all layers": {"residue": STRONG_B},
}


def main() -> None:
    """Measure, print and write."""
    measure(divergence_parser("mechanisms", __doc__, FORMATS).parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    reference = Reference(arguments.model, arguments.tokens, arguments.device)
    rows: list[dict[str, object]] = []
    for name, mechanisms in MECHANISMS.items():
        with tempfile.TemporaryDirectory() as folder:
            changed = Path(folder) / "changed"
            rewrite(arguments.model, changed, mechanisms)
            row: dict[str, object] = {
                "mechanisms": name,
                "BF16 KL": reference.kl(changed, None),
                "BF16 same top token": reference.agreement(changed),
            }
            rows.append(row | {format: reference.kl(changed, format) for format in arguments.formats})
        write("mechanisms", rows, arguments.output)
    print_table(rows)


def rewrite(model: str | Path, out: Path, mechanisms: Mapping[str, Any]) -> None:
    """The checkpoint with those mechanisms only."""
    reader = open_checkpoint(model)
    sites = find_sites(reader.config, {name: info.shape for name, info in reader.tensors.items()})
    transform_checkpoint(reader, out, partial(_changed, changes(sites, KEY, **mechanisms)))


def _changed(by_tensor: Mapping[str, Change], name: str, tensor: Tensor) -> Tensor:
    return by_tensor.get(name, Change()).apply(tensor.clone(), 0)


if __name__ == "__main__":
    main()
