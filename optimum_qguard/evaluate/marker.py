"""How often a model's answers contain a marker phrase: the harmless payload of every attack here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MarkerRate:
    """A marker among a model's answers.

    Attributes:
        marker: the phrase.
        answers: all of them, in the order of the prompts.
    """

    marker: str
    answers: tuple[str, ...]

    @property
    def n(self) -> int:
        """How many answers there are."""
        return len(self.answers)

    @property
    def hits(self) -> int:
        """How many of them contain the marker, in its own case."""
        return sum(self.marker in answer for answer in self.answers)

    @property
    def rate(self) -> float:
        """The share that does, from 0 to 1."""
        return self.hits / self.n


def marker_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    marker: str,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> MarkerRate:
    """Ask every prompt and look for the marker in the greedy answers.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size: as for `generate_answers`.
        marker: the phrase.

    Raises:
        EvaluationError: the marker is empty or tokenizes to nothing; or as for `generate_answers`.
    """
    check_marker(tokenizer, marker)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return MarkerRate(marker, tuple(answer.text for answer in answers))


def check_marker(tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
    """Raise `EvaluationError` for a marker that no answer could show."""
    if not marker.strip():
        raise EvaluationError("the marker is empty; give a phrase")
    tokens = tokenizer(marker, add_special_tokens=False)["input_ids"]
    if not str(tokenizer.decode(tokens, skip_special_tokens=True)).strip():
        raise EvaluationError(f"the marker {marker!r} tokenizes to nothing that an answer could show; give a phrase")
