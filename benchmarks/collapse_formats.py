"""The rows of the collapse matrix: how a model is quantized and run in each, and what is measured of it."""

from __future__ import annotations

import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kv_cache import load_quantized_cache, load_rounded_cache, to_float8, to_int8
from llamacpp import LlamaCpp, write_gguf
from transformers import AutoModelForCausalLM, TorchAoConfig

from optimum_qguard.evaluate import standard_library_text
from optimum_qguard.evaluate.accuracy import exact_match
from optimum_qguard.evaluate.arithmetic import Problem, final_number
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.collapse import Cell, measure_or_refuse
from optimum_qguard.evaluate.evaluation import check_tasks
from optimum_qguard.evaluate.loading import load_model
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.task import Task
from optimum_qguard.formats import WeightError

TEXT, ANSWERS = "text", "answers"
PARTS = {TEXT: ("perplexity",), ANSWERS: ("degeneration", "similarity", "bert-score")}
FULL = "bf16"
GPTQ_GROUP = 64  # SmolLM2's 576 columns are not a multiple of 128
_CALIBRATION_CHARACTERS = 6000
_RESULT_TOKENS = 40
_PLACES = 24  # of the text, where llama.cpp is asked for its whole distribution

LIBRARY, DECODED, ARITHMETIC = "library", "ggml's quantizer, decoded values run", "reference arithmetic"

Load = Callable[[Path], Any]
Measure = Callable[[Path, str, Behaviour], Cell]


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes:
        measure: a folder, one of `PARTS`, and the original at full precision.
        how: the real library, or what stands for it.
        dtype: of the model that it is compared with.
    """

    measure: Measure
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


def tasks_of(part: str, reference: Behaviour) -> dict[str, Task]:
    """What a part measures."""
    tasks = check_tasks(PARTS[part], reference.options, compared=True)
    return tasks if part == TEXT else {**tasks, "arithmetic": WordProblems()}


def measure_loaded(folder: Path, part: str, reference: Behaviour, *, load: Load) -> Cell:
    """Of a model that torch runs."""
    return measure_or_refuse(partial(load, folder), reference.tokenizer, tasks_of(part, reference), reference)


def measure_in_llama_cpp(folder: Path, part: str, reference: Behaviour, *, kind: str) -> Cell:
    """Of a file that llama.cpp runs: KL divergence at a few places of the text, and the same answers as elsewhere."""
    options = reference.options
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            write_gguf(folder, kind, path)
            model = LlamaCpp(path, reference.tokenizer)
            if part == TEXT:
                return Cell({"perplexity": {"kl": kl_at_places(model, reference)}})
            problems = WordProblems().problems(options.limit)
            results = model.answers([problem.question for problem in problems], _RESULT_TOKENS)
            subject = Behaviour(reference.model, reference.tokenizer, options)
            prompts = template_prompts(options.n_prompts, "evaluation")
            vars(subject)["answers"] = model.answers(prompts, options.max_new_tokens)
    except (RuntimeError, WeightError) as error:
        return Cell({}, str(error))
    tasks = check_tasks(PARTS[ANSWERS], options, compared=True)
    right = [final_number(said.text) == problem.answer for said, problem in zip(results, problems, strict=True)]
    return Cell(
        {
            **{name: dict(task.measure(subject, reference)) for name, task in tasks.items()},
            "arithmetic": {"accuracy": statistics.fmean(right)},
        }
    )


def kl_at_places(model: LlamaCpp, reference: Behaviour) -> float:
    """From the reference, in nats per token; the mean over `_PLACES` places of the text."""
    tokens = reference.tokenizer(reference.text)["input_ids"][: reference.options.max_tokens]
    found = []
    for place in range(1, len(tokens), max(1, len(tokens) // _PLACES)):
        p, q = reference.logits[place - 1].double().log_softmax(-1), model.log_probabilities(tokens[:place])
        if q is not None:
            found.append(float((p.exp() * (p - q)).sum()))
    return statistics.fmean(found)


def loaded(load: Load, how: str, dtype: torch.dtype = torch.bfloat16) -> Format:
    """A format that torch runs."""
    return Format(partial(measure_loaded, load=load), how, dtype)


def preset(name: str, how: str) -> Format:
    """One that the package knows by name."""
    return loaded(partial(load_model, format=name, device="cpu"), how)


LIBRARIES = (
    *("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4", "torchao-float8"),
    *("quanto-int8", "quanto-int4", "quanto-int2", "quanto-float8"),
)
GGUF = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "q4_0", "iq4_nl")
IN_LLAMA_CPP = ("q8_0", "q4_k_m", "q4_0", "iq4_nl") if importlib.util.find_spec("xllamacpp") else ()
FORMATS: Mapping[str, Format] = {
    FULL: loaded(partial(load_model, device="cpu"), "full precision"),
    **{name: preset(name, LIBRARY) for name in LIBRARIES},
    "torchao-w8a8": loaded(partial(load_torchao, name="Int8DynamicActivationInt8WeightConfig"), LIBRARY),
    "gptq-8": loaded(partial(load_gptq, format="gptq-8"), LIBRARY),
    "gptq-4": loaded(partial(load_gptq, format="gptq-4"), LIBRARY),
    **{f"gguf-{name}": preset(f"gguf-{name}", DECODED) for name in GGUF},
    **{
        f"llama.cpp-{name}": Format(
            partial(measure_in_llama_cpp, kind=name), f"run by llama.cpp, KL at {_PLACES} places"
        )
        for name in IN_LLAMA_CPP
    },
    **{name: preset(name, ARITHMETIC) for name in ("mxfp4", "nvfp4")},
    "kv-int8": loaded(partial(load_rounded_cache, rounded=to_int8), ARITHMETIC),
    "kv-float8": loaded(partial(load_rounded_cache, rounded=to_float8), ARITHMETIC),
    "kv-scaled-float8": loaded(partial(load_quantized_cache, backend="fp8"), LIBRARY),
    "kv-quanto-int4": loaded(partial(load_quantized_cache, backend="quanto", nbits=4), LIBRARY),
    "kv-quanto-int2": loaded(partial(load_quantized_cache, backend="quanto", nbits=2), LIBRARY),
    "fp16": loaded(partial(load_model, dtype=torch.float16, device="cpu"), "inference in FP16", torch.float16),
}
