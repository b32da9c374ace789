"""Answers out of a passage: F1 and exact match of SQuAD, through torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_qguard.evaluate.dataset import load_rows, require
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passage:
    """A question about a passage.

    Attributes:
        context: the passage.
        question: about it.
        answers: all that count as right; at least one.
    """

    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What a model is asked."""
        return (
            f"{self.context}\n\nAnswer with a few words from the text above, and nothing else.\n"
            f"Question: {self.question}\nAnswer:"
        )


@dataclass(frozen=True)
class SquadScore:
    """SQuAD's two figures, as shares from 0 to 1.

    Attributes:
        f1: mean overlap of words with the best of the right answers.
        exact_match: share of answers equal to a right one; case, punctuation and articles do not count.
        n: how many questions.
    """

    f1: float
    exact_match: float
    n: int


def squad_score(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> SquadScore:
    """F1 and exact match of texts.

    Args:
        texts: one for each question; at least one.
        answers: for each question all that count as right.

    Raises:
        ImportError: torchmetrics is not installed.
        EvaluationError: no texts, as many answers as texts are not given, or a question has none.
    """
    if not texts or len(texts) != len(answers) or not all(answers):
        raise EvaluationError(f"{len(texts)} texts for {len(answers)} questions: each needs a text and a right answer")
    squad = require("torchmetrics.functional.text").squad
    predictions = [{"id": str(index), "prediction_text": text} for index, text in enumerate(texts)]
    targets = [
        {"id": str(index), "answers": {"text": list(right), "answer_start": [0] * len(right)}}
        for index, right in enumerate(answers)
    ]
    scores = squad(predictions, targets)
    return SquadScore(scores["f1"].item() / 100, scores["exact_match"].item() / 100, len(texts))


def squad(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
) -> SquadScore:
    """Ask every question and score the first line of the greedy answer.

    Args:
        model, tokenizer, max_new_tokens, batch_size: as for `generate_answers`.
        passages: at least one.

    Raises:
        ImportError, EvaluationError: as for `squad_score` and `generate_answers`.
    """
    prompts = [passage.prompt for passage in passages]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    texts = [answer.text.strip().partition("\n")[0] for answer in answers]
    return squad_score(texts, [passage.answers for passage in passages])


def load_squad(
    source: str | Path, *, name: str | None = None, split: str | None = None, limit: int | None = None
) -> list[Passage]:
    """Questions of a data set with SQuAD's columns: context, question, answers.

    Questions without an answer in their passage, as in SQuAD 2.0, are left out.

    Args:
        source, name, split, limit: as for `load_rows`.

    Raises:
        ImportError: ``datasets`` is not installed.
        EvaluationError: it cannot be loaded, has other columns, or none of its questions has an answer.
    """
    passages = [_parse(row, source) for row in load_rows(source, name=name, split=split, limit=limit)]
    answered = [passage for passage in passages if passage.answers]
    if not answered:
        raise EvaluationError(f"{source}: no question has an answer in its passage")
    return answered


def _parse(row: Mapping[str, Any], source: str | Path) -> Passage:
    if not {"context", "question", "answers"} <= row.keys():
        raise EvaluationError(
            f"{source} has the columns {', '.join(row)}; SQuAD's are needed (context, question, answers)"
        )
    answers = row["answers"]
    if not isinstance(answers, Mapping) or not isinstance(answers.get("text"), (list, tuple)):
        raise EvaluationError(f"{source}: answers are {answers!r}; SQuAD's are {{'text': […], 'answer_start': […]}}")
    return Passage(row["context"], row["question"], tuple(answers["text"]))
