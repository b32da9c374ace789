"""What benchmarks of protected checkpoints share: their arguments, and how far a checkpoint is from its original."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, argument_parser
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.key import Key
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.perplexity import kl_divergence, next_token_logits
from optimum_qguard.formats import WeightError

KEY = Key(bytes(range(32)))
STRONG_A = Conditioning(1024.0, 1024.0, plain_layers=0)


def divergence_parser(name: str, description: str, formats: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of such a benchmark, and no more messages from libraries."""
    disable_progress_bar()
    logging.disable(logging.ERROR)
    parser = argument_parser(description, RESULTS / f"{name}.json")
    parser.add_argument("--formats", nargs="+", default=formats)
    parser.add_argument("--tokens", type=int, default=256, help="how much of the text KL divergence is measured on")
    parser.add_argument("--model", default=smollm2_path(), help="folder or Hub id")
    return parser


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
