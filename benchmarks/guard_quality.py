"""What guard costs in quality: perplexity, and KL divergence to full precision, of really quantized models."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, argument_parser, machine, print_table, versions, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_qguard import QGuardConfig
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.perplexity import next_token_logits, perplexity_and_kl
from optimum_qguard.guard.backends import preset
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError

BACKENDS = (
    "bnb-int8",
    "bnb-nf4",
    "bnb-fp4",
    "torchao-int8",
    "torchao-int4",
    "torchao-float8",
    "quanto-int8",
    "quanto-int4",
)
OPTIONAL_BACKENDS = ("quanto-float8", "quanto-int2")
PLAIN = "plain"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "Gaussian, fixed 1e-3": {"method": "gaussian", "noise": 1e-3},
    "Gaussian, global": {"method": "gaussian", "noise": "global"},
    "Gaussian, per layer": {"method": "gaussian"},
    "uniform, per layer": {"method": "uniform"},
    "stochastic": {"method": "stochastic"},
}
_WINDOW = 2048


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "guard_quality.json")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS + OPTIONAL_BACKENDS, default=BACKENDS)
    parser.add_argument("--tokens", type=int, default=2048, help="how much of the text")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 moved off the Q4_1 grid it came on")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has already")
    arguments = parser.parse_args()
    disable_progress_bar()
    # LLM.int8 says for every matrix product that it casts float32 to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    model_id = arguments.model or smollm2_path(off_grid=True)
    common = {
        "model": arguments.model or "SmolLM2-135M, off grid",
        "tokens": arguments.tokens,
        "device": arguments.device,
    }
    rows = _rows_of(arguments.output, common) if arguments.resume else []
    done = {(row["backend"], row["method"]) for row in rows if row["seeds"] in (1, arguments.seeds)}
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    judge = Judge(tokenizer, standard_library_text(8 * arguments.tokens), arguments.tokens)
    model = AutoModelForCausalLM.from_pretrained(model_id, device_map={"": arguments.device})
    judge.set_reference(model)
    if not rows:
        rows.append({**common, **figures("full precision", "", [(*judge.compare(model), 0.0)], plain_kl=None)})
    del model
    for backend in arguments.backends:
        plain_kl = next((row["KL"] for row in rows if (row["backend"], row["method"]) == (backend, PLAIN)), None)
        for method in (PLAIN, *METHODS):
            if (backend, method) in done:
                continue
            try:
                runs = run(model_id, backend, method, arguments.device, arguments.seeds, judge)
            except (QGuardConfigError, QGuardError) as error:
                print(f"{backend}, {method}: left out, {error}")
                continue
            if method == PLAIN:
                plain_kl = runs[0][1]
            rows.append({**common, **figures(backend, method, runs, plain_kl)})
            write("guard_quality", rows, arguments.output)
    print_table(rows)


class Judge:
    """Compares models with a reference on one text.

    Args:
        tokenizer: of all of them.
        text: what they predict.
        tokens: how many of its tokens.
    """

    def __init__(self, tokenizer: Any, text: str, tokens: int) -> None:
        self._arguments = {
            "tokenizer": tokenizer,
            "text": text,
            "max_tokens": tokens,
            "window": _WINDOW,
            "stride": _WINDOW // 2,
        }
        self._reference = torch.empty(0)

    def set_reference(self, model: Any) -> None:
        """The model that KL divergence is to."""
        self._reference = next_token_logits(model, **self._arguments)

    def compare(self, model: Any) -> tuple[float, float]:
        """Perplexity, and KL divergence in nats per token, from one forward pass."""
        quality = perplexity_and_kl(self._reference, model, **self._arguments)
        return quality.perplexity, quality.kl


def run(
    model_id: str | Path, backend: str, method: str, device: str, seeds: int, judge: Judge
) -> list[tuple[float, float, float]]:
    """Perplexity, KL divergence and share of changed symbols, for each seed; once if nothing is random."""
    runs = []
    for seed in range(1 if method == PLAIN else seeds):
        config = preset(backend)
        if method != PLAIN:
            config = QGuardConfig(config, seed=seed, **METHODS[method])
        model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=config, device_map={"": device})
        changed = 0.0 if method == PLAIN else model.qguard_report.share_changed
        runs.append((*judge.compare(model), changed))
        del model
    return runs


def figures(
    backend: str, method: str, runs: list[tuple[float, float, float]], plain_kl: float | None
) -> dict[str, object]:
    """One row: means and standard deviations over the runs."""
    perplexities, divergences, changed = zip(*runs, strict=True)
    mean = statistics.fmean(divergences)
    return {
        "backend": backend,
        "method": method,
        "seeds": len(runs),
        "perplexity": statistics.fmean(perplexities),
        "perplexity sd": _deviation(perplexities),
        "KL": mean,
        "KL sd": _deviation(divergences),
        "KL / plain KL": mean / plain_kl if plain_kl else None,
        "changed": statistics.fmean(changed),
    }


def _deviation(values: tuple[float, ...]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _rows_of(output: Path, common: Mapping[str, object]) -> list[dict[str, Any]]:
    """The rows of an earlier run, if it was of the same model and text on this machine with these versions."""
    if not output.exists():
        return []
    result = json.loads(output.read_text())
    same = result["machine"] == machine() and result["versions"] == versions()
    rows: list[dict[str, Any]] = result["rows"]
    return rows if same and all(row.items() >= common.items() for row in rows) else []


if __name__ == "__main__":
    main()
