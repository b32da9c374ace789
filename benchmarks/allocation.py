"""Allocated widths against the maps that the paper on switchable precision made by hand, at equal or fewer bits.

Each layer's sensitivity is measured on one text, and all maps are compared on another. Models: SmolLM2, and a small
GPT-2 that is trained on the spot to answer questions. The measurements are kept in the cache folder, so that a script
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hand_made_maps import hand_made_maps
from harness import RESULTS, argument_parser, print_table, rows_of_others, write
from tiny_gpt2 import END, tiny_gpt2
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.bitmaps import Judge
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.evaluate.generated_squad import SquadSplit, generated_passages
from optimum_qguard.evaluate.loading import load_tokenizer
from optimum_qguard.precision.allocate import allocate
from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.sensitivity import Sensitivity, measure_sensitivity

UNIFORM = (3, 5, 6, 7)


@dataclass(frozen=True)
class Subject:
    """A model, what its layers' sensitivity is measured on, and what maps are compared on.

    Attributes:
        path: makes it, if it is not there, and gives its folder.
        measured, held_out: text of at least so many tokens.
        tokens: of the text that sensitivity is measured on, and of the one that maps are compared on.
    """

    path: Callable[[], Path]
    measured: Callable[[int], str]
    held_out: Callable[[int], str]
    tokens: tuple[int, int]


def _prose(split: Any) -> Callable[[int], str]:
    return lambda tokens: standard_library_text(8 * tokens, split)


def _questions(split: SquadSplit) -> Callable[[int], str]:
    """Answered, as `tiny_gpt2` was trained on them; each has more than ten tokens."""
    return lambda tokens: "".join(
        f"{passage.prompt} {passage.answers[0]}{END}"
        for passage in generated_passages(tokens // 10 + 1, seed=10**7, split=split)
    )


SUBJECTS: Mapping[str, Subject] = {
    "SmolLM2": Subject(lambda: smollm2_path(off_grid=True), _prose("training"), _prose("evaluation"), (128, 1024)),
    "GPT-2": Subject(tiny_gpt2, _questions("train"), _questions("validation"), (2000, 4000)),
}


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "allocation.json")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has of other models")
    disable_progress_bar()
    logging.disable(logging.ERROR)
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    rows = rows_of_others(arguments.output, arguments.models) if arguments.resume else []
    for name in arguments.models:
        subject = SUBJECTS[name]
        folder = subject.path()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device).eval()
        tokenizer = load_tokenizer(folder)
        n_measured, n_held_out = subject.tokens
        judge = Judge(model, tokenizer, subject.held_out(n_held_out), max_tokens=n_held_out)
        sensitivity = _sensitivity(name, model, tokenizer, subject.measured(n_measured), n_measured)
        maps = {**hand_made_maps(model), **{f"uniform {bits}": BitMap({"*": bits}) for bits in UNIFORM}}
        for title, bitmap in tqdm(maps.items(), desc=f"{name}: maps", leave=False):
            budget = bitmap.average_bits(model)
            found = allocate(sensitivity, budget)
            by_hand, allocated = judge.quality(bitmap), judge.quality(found.bitmap)
            rows.append(
                {
                    "model": name,
                    "map": title,
                    "bits": budget,
                    "KL": by_hand.kl,
                    "perplexity": by_hand.perplexity,
                    "allocated bits": found.average_bits,
                    "allocated KL": allocated.kl,
                    "allocated perplexity": allocated.perplexity,
                    "allocated KL / KL": allocated.kl / by_hand.kl,
                    "predicted KL": sensitivity.predict(_widths(bitmap, model)),
                    "allocated predicted KL": found.predicted,
                }
            )
            write("allocation", rows, arguments.output)
    print_table(rows)


def _widths(bitmap: BitMap, model: Any) -> dict[str, int]:
    return {name: bits for name, bits in bitmap.resolve(model).items() if bits is not None}


def _sensitivity(name: str, model: Any, tokenizer: Any, text: str, tokens: int) -> Sensitivity:
    cache = cache_folder() / "sensitivity" / f"{name}-{tokens}.json"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc=f"{name}: sensitivity", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return measure_sensitivity(model, tokenizer, text, tokens=tokens, cache=cache, progress=progress)


if __name__ == "__main__":
    main()
