"""What quantizers make of an encrypted model, beside what they make of its original.

SmolLM2 as published, and three encryptions of it: the default, weaker traps (which GGUF's float16 scales can hold), and
the profile for FP16 inference. Every quantizer is the real library unless ``how`` says otherwise. Single runs are kept
in the cache folder, so that a script that was stopped goes on where it was; rows of formats and models that are not
chosen stay as they are in the file, with their dates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from collapse_formats import ANSWERS, FORMATS, FULL, PARTS, TEXT
from harness import RESULTS, argument_parser, day_of, earlier_rows, print_table, versions, write
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import FP16_SAFE, encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.generation import Answer, generate_answers
from optimum_qguard.evaluate.heat_map import plot_heat_map
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.similarity import similarity

ORIGINAL, DEFAULT, WEAKER = "original", "encrypted", "weaker traps"
ENCRYPTED: Mapping[str, Traps] = {
    DEFAULT: Traps(),
    WEAKER: Traps(strength=6, qk_fraction=0.25),
    "FP16-safe": FP16_SAFE,
}
MODELS = (ORIGINAL, *ENCRYPTED)
KEY = Key(bytes(range(32)))
IDENTITY = "identity"  # the part that only full precision has
COLUMNS: Mapping[str, tuple[str, str]] = {
    "KL": ("perplexity", "kl"),
    "perplexity": ("perplexity", "perplexity"),
    "CosSim": ("similarity", "cosine"),
    "Retrieval@1": ("similarity", "retrieval_at_1"),
    "BERTScore F1": ("bert-score", "f1"),
    "MaxRepeat-3": ("degeneration", "max_repeat_3"),
    "Seq-Rep-4": ("degeneration", "seq_rep_4"),
    "accuracy": ("arithmetic", "accuracy"),
}
SIZES = {"tokens": 512, "prompts": 16, "new tokens": 64, "questions": 24, "identity prompts": 200}
IDENTITY_TOKENS = 32
_TURN = 40  # prompts that one model answers before it is the other's turn


def main() -> None:
    """Measure what is missing, print, write and draw."""
    parser = argument_parser(__doc__, RESULTS / "collapse_matrix.json")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace(' ', '-')}", type=int, default=value)
    parser.add_argument("--table-only", action="store_true", help="measure nothing, make the table of what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    SIZES.update({name: getattr(arguments, name.replace(" ", "_")) for name in SIZES})
    measure_matrix(arguments)


def measure_matrix(arguments: argparse.Namespace) -> None:
    """All runs, the table, and the picture beside it."""
    if not arguments.table_only:
        for part in arguments.parts:
            for format in arguments.formats:
                for name in arguments.models:
                    if is_wanted(name, format, part):
                        run(name, format, part)
                    if format == FULL and name == DEFAULT:
                        identity(name)
    rows = in_order([*table(arguments.models, arguments.formats), *rows_of_the_rest(arguments)])
    write("collapse_matrix", rows, arguments.output)
    draw(rows, arguments.output.with_suffix(".png"))
    print_table(rows)


def slug(name: str) -> str:
    """A model's name in file names: it says how it was encrypted."""
    if name == ORIGINAL:
        return name
    return "-".join(f"{parameter}-{value}" for parameter, value in vars(ENCRYPTED[name]).items())


@cache
def folder_of(name: str) -> Path:
    """A model, encrypted into the cache folder when it is first asked for."""
    original = smollm2_path()
    if name == ORIGINAL:
        return original
    folder = cache_folder() / f"smollm2-135m-instruct-encrypted-{slug(name)}"

    def make(out: Path) -> None:
        encrypt_checkpoint(original, out, key=KEY, traps=ENCRYPTED[name])

    return made_once(folder, make)


@cache
def runs_folder() -> Path:
    """Where single runs are kept: their sizes and the versions they ran with are part of its name."""
    key = "-".join(f"{name.replace(' ', '')}{value}" for name, value in SIZES.items())
    packages = ("torch", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "gptqmodel")
    installed = "-".join(versions().get(package, "none") for package in packages)
    folder = cache_folder() / "collapse-matrix" / f"{key}-{installed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_file(name: str, format: str, part: str) -> Path:
    """One run's JSON file."""
    return runs_folder() / f"{format}--{slug(name)}--{part}.json"


def kept(name: str, format: str, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One run, from its file or made now."""
    file = run_file(name, format, part)
    if not file.exists():
        start = time.perf_counter()
        found = make()
        atomic_write(file, json.dumps(found))
        print(f"{format}, {name}, {part}, {time.perf_counter() - start:.0f} s: {found}", flush=True)
    return dict(json.loads(file.read_text()))


def is_wanted(name: str, format: str, part: str) -> bool:
    """Whether there is such a run: of what the quantizer refused there are no answers, and weaker traps are asked only
    where the table is about them."""
    if part == TEXT:
        return True
    about = name != WEAKER or format == FULL or format.startswith(("gguf-", "llama.cpp-"))
    return about and bool(run(name, format, TEXT)["figures"])


def run(name: str, format: str, part: str) -> dict[str, Any]:
    """One model in one format: what it predicts of the text, or its answers."""

    def make() -> dict[str, Any]:
        reference = reference_in(FORMATS[format].dtype)
        return FORMATS[format].measure(folder_of(name), part, reference).as_json()

    return kept(name, format, part, make)


@cache
def reference_in(dtype: torch.dtype) -> Behaviour:
    """The original at full precision, and what it said."""
    folder = folder_of(ORIGINAL)
    options = Options(
        max_tokens=SIZES["tokens"],
        window=SIZES["tokens"],
        n_prompts=SIZES["prompts"],
        max_new_tokens=SIZES["new tokens"],
        limit=SIZES["questions"],
    )
    return Behaviour(load_model(folder, dtype=dtype, device="cpu"), load_tokenizer(folder), options)


def identity(name: str) -> dict[str, Any]:
    """An encrypted model and the original, both in BF16, in turn: how many greedy tokens differ, and how fast."""

    def make() -> dict[str, Any]:
        reference = reference_in(torch.bfloat16)
        models = {ORIGINAL: reference.model, name: load_model(folder_of(name), device="cpu")}
        prompts = template_prompts(SIZES["identity prompts"], "attack")  # of that split there are enough
        answers: dict[str, list[Answer]] = {each: [] for each in models}
        seconds = dict.fromkeys(models, 0.0)
        for turn, start in enumerate(range(0, len(prompts), _TURN)):
            for each in list(models)[:: -1 if turn % 2 else 1]:
                asked = prompts[start : start + _TURN]
                begin = time.perf_counter()
                answers[each] += generate_answers(
                    models[each], reference.tokenizer, asked, max_new_tokens=IDENTITY_TOKENS, batch_size=_TURN
                )
                seconds[each] += time.perf_counter() - begin
        said = {each: [answer.text for answer in found] for each, found in answers.items()}
        tokens = {each: sum(len(answer.tokens) for answer in found) for each, found in answers.items()}
        pairs = zip(answers[ORIGINAL], answers[name], strict=True)
        near = similarity(said[name], said[ORIGINAL])
        return {
            "tokens": tokens[ORIGINAL],
            "differing tokens": sum(differing(one.tokens, other.tokens) for one, other in pairs),
            "CosSim": near.cosine,
            "Retrieval@1": near.retrieval_at_1,
            "tokens/s": {each: tokens[each] / seconds[each] for each in models},
        }

    return kept(name, FULL, IDENTITY, make)


def differing(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """In how many places two answers differ; where one ends first, the rest of the other counts."""
    return sum(a != b for a, b in itertools.zip_longest(one, other))


def table(models: Sequence[str], formats: Sequence[str]) -> list[dict[str, Any]]:
    """Every run that there is, formats together."""
    rows = []
    for format in formats:
        for name in models:
            row = {"format": format, "how": FORMATS[format].how, "model": name, **summary(name, format)}
            if row["status"] is not None:
                parts = (run_file(name, format, part) for part in (*PARTS, IDENTITY))
                rows.append({**row, "date": day_of(file for file in parts if file.exists())})
    return rows


def rows_of_the_rest(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What an earlier run found about formats or models that this one leaves alone."""
    chosen = set(itertools.product(arguments.formats, arguments.models))
    return [row for row in earlier_rows(arguments.output) if (row["format"], row["model"]) not in chosen]


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By format as they are listed, then by model."""
    return sorted(rows, key=lambda row: (list(FORMATS).index(row["format"]), MODELS.index(row["model"])))


def read(name: str, format: str, part: str) -> dict[str, Any]:
    """One run from its file; nothing if there is none."""
    file = run_file(name, format, part)
    return dict(json.loads(file.read_text())) if file.exists() else {}


def summary(name: str, format: str) -> dict[str, Any]:
    """One row's figures; in BF16 similarity is of the answers to many prompts."""
    text, answers, same = (read(name, format, part) for part in (TEXT, ANSWERS, IDENTITY))
    figures = {**text.get("figures", {}), **answers.get("figures", {})}
    row: dict[str, Any] = {"status": text.get("status")}
    row |= {column: figures.get(task, {}).get(figure) for column, (task, figure) in COLUMNS.items()}
    row |= {column: same[column] for column in ("CosSim", "Retrieval@1") if same}
    speeds = same.get("tokens/s", {})
    return {
        **row,
        "differing tokens": same.get("differing tokens"),
        "of tokens": same.get("tokens"),
        "tokens/s": speeds.get(name),
        "tokens/s of the original": speeds.get(ORIGINAL),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL divergence as a heat map."""
    shown = {row["model"] for row in rows}
    models = [name for name in MODELS if name in shown]
    values: dict[str, list[float | str | None]] = {}
    for row in rows:
        cells = values.setdefault(row["format"], [None] * len(models))
        cells[models.index(row["model"])] = word(row["status"]) if row["KL"] is None else row["KL"]
    plot_heat_map(values, models, path)


def word(status: str) -> str:
    """What a cell without a number says."""
    return "refused" if status.startswith("refused") else "NaN" if "kl is NaN" in status else "inf"


if __name__ == "__main__":
    main()
