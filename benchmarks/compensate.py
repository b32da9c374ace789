"""What error feedback gives in quality, and what it costs in time and memory, of really quantized models."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from guard_quality import Judge
from harness import RESULTS, argument_parser, peak_memory, print_table, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_qguard import QGuardConfig
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.guard.backends import preset

FORMATS = ("bnb-nf4", "bnb-fp4", "torchao-int4", "bnb-int8")
PLAIN = "plain"
OWN = "compensated, own generations"
TEXTS = "compensated, texts"
METHODS = (PLAIN, "stochastic", OWN, TEXTS)
_CHARACTERS = 1 << 16


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "compensate.json")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tokens", type=int, default=2048, help="how much of the text KL divergence is measured on")
    parser.add_argument("--no-peak", action="store_true", help="leave peak memory out, which takes a second load each")
    parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 moved off the Q4_1 grid it came on")
    arguments = parser.parse_args()
    disable_progress_bar()
    # LLM.int8 says for every matrix product that it casts float32 to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    path = arguments.model or smollm2_path(off_grid=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    judge = Judge(tokenizer, standard_library_text(8 * arguments.tokens), arguments.tokens)
    judge.set_reference(AutoModelForCausalLM.from_pretrained(path, device_map={"": arguments.device}))
    rows: list[Mapping[str, object]] = []
    for format in arguments.formats:
        plain_kl = None
        for method in arguments.methods:
            go = partial(load, path, format, method, arguments.device)
            wall, cpu = time.perf_counter(), os.times()
            model = go()
            wall = time.perf_counter() - wall
            spent = os.times()
            perplexity, divergence = judge.compare(model)
            if method == PLAIN:
                plain_kl = divergence
            del model
            peak = None if arguments.no_peak else peak_memory(go)
            rows.append(
                {
                    "model": arguments.model or "SmolLM2-135M, off grid",
                    "format": format,
                    "method": method,
                    "perplexity": perplexity,
                    "KL": divergence,
                    "KL / plain KL": None if plain_kl is None else divergence / plain_kl,
                    "wall s": wall,
                    "CPU s": spent.user + spent.system - cpu.user - cpu.system,
                    "peak MB": peak and (peak.cuda if arguments.device == "cuda" else peak.rss) / 1e6,
                }
            )
            write("compensate", rows, arguments.output)
    print_table(rows)


def load(path: str | Path, format: str, method: str, device: str) -> Any:
    """The quantized model."""
    disable_progress_bar()
    config = preset(format)
    if method != PLAIN:
        texts = [standard_library_text(_CHARACTERS, "training")] if method == TEXTS else None
        compensate = "auto" if method == OWN else texts
        config = QGuardConfig(config, method="stochastic", compensate=compensate, seed=1)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": device})


if __name__ == "__main__":
    main()
