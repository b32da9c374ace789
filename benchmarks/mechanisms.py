"""The ablation that the paper says it lacks: mechanisms A, B and C alone and together, at full precision and quantized.

A: ill-conditioning, B: residue, C: scaling traps, each with its defaults; and A and B much stronger than theirs.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness import RESULTS, argument_parser, print_table, write
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.writer import transform_checkpoint
from optimum_qguard.encrypt.architectures import find_sites
from optimum_qguard.encrypt.change import Change, changes
from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.residue import Residue
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.perplexity import kl_divergence, next_token_logits
from optimum_qguard.formats import WeightError

KEY = Key(bytes(range(32)))
FORMATS = ("bnb-int8", "bnb-nf4", "torchao-int8", "quanto-float8", "mxfp4")
A, B, C = Conditioning(), Residue(), Traps()
STRONG_A = Conditioning(1024.0, 1024.0, plain_layers=0)
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


class Reference:
    """The original at full precision, and how far others are from it.

    Args:
        model: folder or Hub id.
        n_tokens: of the documentation of Python's standard library.
    """

    def __init__(self, model: str | Path, n_tokens: int, device: str | None = None) -> None:
        self._device = device
        self._n_tokens = n_tokens
        self._text = standard_library_text(8 * n_tokens)
        self._tokenizer = load_tokenizer(model)
        self._logits = self._predict(load_model(model, device=device))

    def agreement(self, model: str | Path) -> float:
        """Share of the tokens where both hold the same next token for the most likely, at full precision."""
        logits = self._predict(load_model(model, device=self._device))
        return float((logits.argmax(-1) == self._logits.argmax(-1)).double().mean())

    def kl(self, model: str | Path, format: str | None) -> float | str:
        """Divergence of the model in that format, nats per token; ``"refused"`` where the quantizer takes no such
        weights, ``"NaN"`` where the quantized model computes no numbers."""
        try:
            loaded = load_model(model, format, device=self._device)
        except (WeightError, EvaluationError):
            return "refused"
        found = kl_divergence(self._logits, loaded, self._tokenizer, self._text, max_tokens=self._n_tokens)
        return found if math.isfinite(found) else "NaN"

    def _predict(self, model: Any) -> Tensor:
        return next_token_logits(model, self._tokenizer, self._text, max_tokens=self._n_tokens)


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "mechanisms.json")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--tokens", type=int, default=256, help="how much of the text KL divergence is measured on")
    parser.add_argument("--model", default=smollm2_path(), help="folder or Hub id")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.disable(logging.ERROR)
    measure(arguments)


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
