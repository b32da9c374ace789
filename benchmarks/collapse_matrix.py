"""What quantizers make of an encrypted model, beside what they make of its original.

SmolLM2 as published, and three encryptions of it: the default, weaker traps (which GGUF's float16 scales can hold), and
the profile for FP16 inference. Every quantizer is the real library unless ``how`` says otherwise. Single runs are
kept in the cache folder, so that a script that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, argument_parser, print_table, versions, write
from llamacpp import LlamaCpp, write_gguf
from transformers import AutoModelForCausalLM, DynamicCache, TorchAoConfig
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import FP16_SAFE, encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.accuracy import exact_match
from optimum_qguard.evaluate.arithmetic import Problem, final_number
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.collapse import Cell, measure_or_refuse
from optimum_qguard.evaluate.evaluation import check_tasks
from optimum_qguard.evaluate.generation import Answer, generate_answers
from optimum_qguard.evaluate.heat_map import plot_heat_map
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.similarity import similarity
from optimum_qguard.evaluate.task import Task
from optimum_qguard.formats import WeightError

ORIGINAL, DEFAULT, WEAKER = "original", "encrypted", "weaker traps"
ENCRYPTED: Mapping[str, Traps] = {DEFAULT: Traps(), WEAKER: Traps(strength=9), "FP16-safe": FP16_SAFE}
MODELS = (ORIGINAL, *ENCRYPTED)
KEY = Key(bytes(range(32)))
FULL, IDENTITY = "bf16", "bf16-identity"
GPTQ_GROUP = 64  # SmolLM2's 576 columns are not a multiple of 128
_CALIBRATION_CHARACTERS = 6000
_RESULT_TOKENS = 40
_PLACES = 24  # of the text, where llama.cpp is asked for its whole distribution

Load = Callable[[Path], Any]


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes:
        load: a folder, quantized; ``None`` for what llama.cpp runs.
        how: the real library, or what stands for it.
        dtype: of the model that it is compared with.
    """

    load: Load | None
    how: str
    dtype: torch.dtype = torch.bfloat16


def load_gptq(folder: Path, format: str) -> Any:
    """Through gptqmodel, calibrated on eight pages of text."""
    text = standard_library_text(_CALIBRATION_CHARACTERS, "training")
    texts = [text[start : start + 750] for start in range(0, len(text), 750)]
    return load_model(folder, format, dataset=texts, group_size=GPTQ_GROUP, device="cpu")


def load_torchao(folder: Path, name: str) -> Any:
    """With activations quantized while it runs."""
    from torchao import quantization

    config = TorchAoConfig(getattr(quantization, name)())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return model.eval()


def to_int8(values: torch.Tensor) -> torch.Tensor:
    """Keys or values of each token and head, ``(…, head_dim)``, to int8 by their absmax, and back."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (scale * (values.float() / scale).round()).to(values.dtype)


def to_float8(values: torch.Tensor) -> torch.Tensor:
    """To E4M3 and back, clamped, without a scale, as serving engines do by default."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


def load_cached(folder: Path, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Full-precision weights; whatever enters the KV cache is rounded."""
    model = load_model(folder, device="cpu")

    def use_rounding_cache(_: Any, __: Any, arguments: dict[str, Any]) -> Any:
        given = arguments.get("past_key_values")
        if not isinstance(given, DynamicCache):
            given = DynamicCache(config=model.config)
        if "update" not in vars(given):
            update = given.update
            given.update = lambda keys, values, *rest, **more: update(rounded(keys), rounded(values), *rest, **more)
        return (), {**arguments, "past_key_values": given, "use_cache": True}

    model.model.register_forward_pre_hook(use_rounding_cache, with_kwargs=True)
    return model


LIBRARY, DECODED, ARITHMETIC = "library", "ggml's quantizer, decoded values run", "reference arithmetic"
LLAMA_CPP = "llama.cpp-"
FORMATS: Mapping[str, Format] = {
    FULL: Format(partial(load_model, device="cpu"), "full precision"),
    **{
        name: Format(partial(load_model, format=name, device="cpu"), LIBRARY)
        for name in (
            "bnb-int8",
            "bnb-nf4",
            "bnb-fp4",
            "torchao-int8",
            "torchao-int4",
            "torchao-float8",
            "quanto-int8",
            "quanto-int4",
            "quanto-int2",
            "quanto-float8",
        )
    },
    "torchao-w8a8": Format(partial(load_torchao, name="Int8DynamicActivationInt8WeightConfig"), LIBRARY),
    "gptq-8": Format(partial(load_gptq, format="gptq-8"), LIBRARY),
    "gptq-4": Format(partial(load_gptq, format="gptq-4"), LIBRARY),
    **{
        f"gguf-{name}": Format(partial(load_model, format=f"gguf-{name}", device="cpu"), DECODED)
        for name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "q4_0")
    },
    **{
        f"{LLAMA_CPP}{name}": Format(None, f"run by llama.cpp, KL at {_PLACES} places")
        for name in ("q8_0", "q4_k_m")
        if importlib.util.find_spec("xllamacpp")
    },
    **{name: Format(partial(load_model, format=name, device="cpu"), ARITHMETIC) for name in ("mxfp4", "nvfp4")},
    "kv-int8": Format(partial(load_cached, rounded=to_int8), ARITHMETIC),
    "kv-float8": Format(partial(load_cached, rounded=to_float8), ARITHMETIC),
    "fp16": Format(partial(load_model, dtype=torch.float16, device="cpu"), "inference in FP16", torch.float16),
}


class WordProblems(Task):
    """One-step problems of small numbers: what a model of this size can do at all."""

    _KINDS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
        ("{name} has {a} apples and gets {b} more. How many apples does {name} have now?", lambda a, b: a + b),
        ("{name} has {a} books and gives {b} away. How many books are left?", lambda a, b: a - b),
        ("{name} has {b} boxes with {a} pens in each. How many pens are there?", lambda a, b: a * b),
    )
    _NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")

    def problems(self, count: int) -> list[Problem]:
        """The same for every model."""
        numbers = random.Random(0)
        found = []
        for index in range(count):
            text, result = self._KINDS[index % len(self._KINDS)]
            a, b = numbers.randint(6, 12), numbers.randint(2, 5)
            name = self._NAMES[index % len(self._NAMES)]
            found.append(Problem(text.format(name=name, a=a, b=b), result(a, b)))
        return found

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        count = subject.options.limit
        found = exact_match(
            subject.model, subject.tokenizer, self.problems(count), max_new_tokens=_RESULT_TOKENS, batch_size=count
        )
        return {"accuracy": found.accuracy}


TASKS = ("perplexity", "degeneration", "similarity", "bert-score")
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
        for format in arguments.formats:
            for name in arguments.models:
                run(name, format)
                if format == FULL and name == DEFAULT:
                    identity(name)
    rows = table(arguments.models, arguments.formats)
    write("collapse_matrix", rows, arguments.output)
    draw(rows, arguments.output.with_suffix(".png"))
    print_table(rows)


@cache
def folder_of(name: str) -> Path:
    """A model, encrypted into the cache folder when it is first asked for."""
    original = smollm2_path()
    if name == ORIGINAL:
        return original
    traps = ENCRYPTED[name]
    sign = "plus" if traps.positive_only else "plus-minus"
    folder = cache_folder() / f"smollm2-135m-instruct-encrypted-{sign}{traps.strength}-{traps.fraction:g}"

    def make(out: Path) -> None:
        encrypt_checkpoint(original, out, key=KEY, traps=traps)

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


def run_file(name: str, format: str) -> Path:
    """One run's JSON file."""
    return runs_folder() / f"{format}--{name.replace(' ', '-')}.json"


def kept(name: str, format: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One run, from its file or made now."""
    file = run_file(name, format)
    if not file.exists():
        start = time.perf_counter()
        found = make()
        atomic_write(file, json.dumps(found))
        print(f"{format}, {name}, {time.perf_counter() - start:.0f} s: {found}", flush=True)
    return dict(json.loads(file.read_text()))


def run(name: str, format: str) -> dict[str, Any]:
    """One model in one format."""

    def make() -> dict[str, Any]:
        if format.startswith(LLAMA_CPP):
            return run_llama_cpp(folder_of(name), format.removeprefix(LLAMA_CPP)).as_json()
        reference = reference_in(FORMATS[format].dtype)
        load = FORMATS[format].load
        assert load is not None
        return measure_or_refuse(
            partial(load, folder_of(name)), reference.tokenizer, tasks_for(name, format), reference
        ).as_json()

    return kept(name, format, make)


def tasks_for(name: str, format: str) -> dict[str, Task]:
    """All tasks where the table is about; of the weaker encryptions in the other formats KL divergence is enough."""
    options = reference_in(torch.bfloat16).options
    if name in (ORIGINAL, DEFAULT) or format in (FULL, "fp16") or (name == WEAKER and format.startswith("gguf-")):
        return {**check_tasks(TASKS, options, compared=True), "arithmetic": WordProblems()}
    return check_tasks(TASKS[:1], options, compared=True)


def run_llama_cpp(folder: Path, kind: str) -> Cell:
    """A file that llama.cpp runs: KL divergence at a few places of the text, and the same answers as elsewhere."""
    reference = reference_in(torch.bfloat16)
    options = reference.options
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            write_gguf(folder, kind, path)
            model = LlamaCpp(path, reference.tokenizer)
            tokens = reference.tokenizer(reference.text)["input_ids"][: options.max_tokens]
            found = []
            for place in range(1, len(tokens), max(1, len(tokens) // _PLACES)):
                q, p = model.log_probabilities(tokens[:place]), reference.logits[place - 1].double().log_softmax(-1)
                if q is not None:
                    found.append(float((p.exp() * (p - q)).sum()))
            problems = WordProblems().problems(options.limit)
            results = model.answers([problem.question for problem in problems], _RESULT_TOKENS)
            subject = Behaviour(reference.model, reference.tokenizer, options)
            vars(subject)["answers"] = model.answers(
                template_prompts(options.n_prompts, "evaluation"), options.max_new_tokens
            )
    except (RuntimeError, WeightError) as error:
        return Cell({}, str(error))
    tasks = check_tasks(TASKS[1:], options, compared=True)
    right = [final_number(said.text) == problem.answer for said, problem in zip(results, problems, strict=True)]
    return Cell(
        {
            "perplexity": {"kl": statistics.fmean(found)},
            **{name: dict(task.measure(subject, reference)) for name, task in tasks.items()},
            "arithmetic": {"accuracy": statistics.fmean(right)},
        }
    )


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

    return kept(name, IDENTITY, make)


def differing(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """In how many places two answers differ; where one ends first, the rest of the other counts."""
    return sum(a != b for a, b in itertools.zip_longest(one, other))


def table(models: Sequence[str], formats: Sequence[str]) -> list[dict[str, Any]]:
    """Every run that there is, formats together."""
    rows = []
    for format in formats:
        for name in models:
            found = read(name, format)
            if found is not None:
                rows.append(
                    {"format": format, "how": FORMATS[format].how, "model": name, **summary(name, format, found)}
                )
    return rows


def read(name: str, format: str) -> dict[str, Any] | None:
    """One run from its file."""
    file = run_file(name, format)
    return dict(json.loads(file.read_text())) if file.exists() else None


def summary(name: str, format: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One row's figures; of the answers in BF16 those to many prompts."""
    figures = found["figures"]
    row = {"status": found["status"]}
    row |= {column: figures.get(task, {}).get(figure) for column, (task, figure) in COLUMNS.items()}
    row |= {"differing tokens": None, "of tokens": None, "tokens/s": None, "tokens/s of the original": None}
    same = read(name, IDENTITY) if format == FULL else None
    if same is not None:
        row |= {column: same[column] for column in ("CosSim", "Retrieval@1", "differing tokens")}
        row["of tokens"] = same["tokens"]
        row["tokens/s"], row["tokens/s of the original"] = same["tokens/s"][name], same["tokens/s"][ORIGINAL]
    return row


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL divergence as a heat map."""
    models = list(dict.fromkeys(row["model"] for row in rows))
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
