"""Question answering under attack: F1 of clean and of attacked questions, with confidence intervals.

What an attacker may change of a question's prompt are the tokens of its passage, but for those that belong to a right
answer and those that the question names too: the answer stays there to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from optimum_qguard.attacks.answer_loss import IGNORED, View
from optimum_qguard.attacks.embedding_pgd import Norm, embedding_pgd
from optimum_qguard.attacks.hotflip import hotflip
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_from_embeddings
from optimum_qguard.evaluate.interval import Interval, bootstrap
from optimum_qguard.evaluate.squad import Passage, squad_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWERED = 0.5


@dataclass(frozen=True)
class Question:
    """A passage's prompt as tokens.

    Attributes:
        prompt: its tokens.
        free: which of them an attacker may change.
        answer: the tokens of the first right answer, as they would follow the prompt.
        barred: tokens that he may not put in: those of the question and of all right answers.
        answers: the right answers.
    """

    prompt: tuple[int, ...]
    free: tuple[bool, ...]
    answer: tuple[int, ...]
    barred: frozenset[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Questions with their answers, right-padded, as attacks take them.

    Attributes:
        input_ids, attention_mask, labels, mask: (batch, length), see `embedding_pgd`.
        candidates: (batch, vocabulary), see `hotflip`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    mask: Tensor
    candidates: Tensor


# Takes a model and a batch, gives embeddings (batch, length, hidden).
Attack = Callable[["PreTrainedModel", Batch], Tensor]


@dataclass(frozen=True)
class Robustness:
    """F1 of each question, before and after.

    Attributes:
        clean, adversarial: (questions,), from 0 to 1.
        exact_match: shares of answers equal to a right one, before and after.
        groups: (questions,), whose randomness is shared: intervals resample groups.
    """

    clean: Tensor
    adversarial: Tensor
    exact_match: tuple[float, float]
    groups: Tensor

    @property
    def clean_f1(self) -> Interval:
        """Mean of ``clean``."""
        return bootstrap(self.clean, groups=self.groups)

    @property
    def adversarial_f1(self) -> Interval:
        """Mean of ``adversarial``."""
        return bootstrap(self.adversarial, groups=self.groups)

    @property
    def delta(self) -> Interval:
        """Mean of what the attack changes, question by question; negative where it hurts."""
        return bootstrap(self.adversarial - self.clean, groups=self.groups)

    @property
    def success_rate(self) -> Interval:
        """Of the questions with a clean F1 of at least one half, the share whose F1 falls below half of that."""
        answered = self.clean >= ANSWERED
        return bootstrap(answered & (self.adversarial < self.clean / 2), answered, groups=self.groups)


def pgd(
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    views: Sequence[View] = (),
    seed: int = 0,
) -> Attack:
    """`embedding_pgd` as an `Attack`."""

    def attack(model: PreTrainedModel, batch: Batch) -> Tensor:
        return embedding_pgd(
            model,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            mask=batch.mask,
            epsilon=epsilon,
            steps=steps,
            step_size=step_size,
            norm=norm,
            views=views,
            seed=seed,
        )

    return attack


def flips(*, flips: int = 3, tries: int = 1, views: Sequence[View] = ()) -> Attack:
    """`hotflip` as an `Attack`."""

    def attack(model: PreTrainedModel, batch: Batch) -> Tensor:
        tokens = hotflip(
            model,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            mask=batch.mask,
            candidates=batch.candidates,
            flips=flips,
            tries=tries,
            views=views,
        )
        return _embeddings(model, tokens)

    return attack


def encode_questions(tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]) -> list[Question]:
    """Prompts as `generate_answers` makes them (the user's turn of a chat, where there is a template), as tokens.

    Raises:
        EvaluationError: no passages, a tokenizer without offsets, or a passage of which no token may change.
    """
    if not passages:
        raise EvaluationError("no questions: at least one is needed")
    if not tokenizer.is_fast:
        raise EvaluationError("the tokenizer does not say where in a text its tokens are; a fast one is needed")
    return [_encode(tokenizer, passage) for passage in passages]


def attack_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    attack: Attack,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """The embeddings of each question's prompt, attacked, (length, hidden); on the CPU.

    Args:
        model: whose loss is attacked; as it is now, so a width may be set or drawn around this call.
        tokenizer: its tokenizer.
        questions: of `encode_questions`.
        attack: `pgd` or `flips`.
        batch_size: questions in one pass; batches are of neighbours.
        progress: is told how many are done, and of how many.

    Raises:
        AttackError: the attack's numbers are out of range.
    """
    attacked: list[Tensor] = []
    for start in range(0, len(questions), batch_size):
        few = questions[start : start + batch_size]
        embeddings = attack(model, _batch(model, tokenizer, few)).cpu()
        attacked += [row[: len(question.prompt)].clone() for row, question in zip(embeddings, few, strict=True)]
        if progress is not None:
            progress(len(attacked), len(questions))
    return attacked


def clean_prompts(model: PreTrainedModel, questions: Sequence[Question]) -> list[Tensor]:
    """The embeddings of each question's prompt as it is, (length, hidden); on the CPU."""
    return [_embeddings(model, torch.tensor(question.prompt, device=model.device)).cpu() for question in questions]


def answer_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
) -> tuple[Tensor, float]:
    """F1 of each question, (questions,), and the share of exact matches; of the first line of the greedy answer.

    Args:
        model, tokenizer, max_new_tokens, batch_size: as for `generate_from_embeddings`.
        questions: of `encode_questions`.
        prompts: their embeddings, clean or attacked.

    Raises:
        ImportError: torchmetrics is not installed.
        EvaluationError: as for `generate_from_embeddings`.
    """
    found = generate_from_embeddings(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    scores = [
        squad_score([answer.text.strip().partition("\n")[0]], [question.answers])
        for answer, question in zip(found, questions, strict=True)
    ]
    exact = sum(score.exact_match for score in scores) / len(scores)
    return torch.tensor([score.f1 for score in scores]), exact


def robustness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    attack: Attack,
    *,
    surrogate: PreTrainedModel | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Robustness:
    """Ask every question as it is and attacked, and score the answers.

    Args:
        model: which answers; as it is now, so a width may be set or drawn around this call.
        tokenizer: its tokenizer.
        passages: at least one.
        attack: `pgd` or `flips`.
        surrogate: whose loss is attacked; by default the model's own. Of the same embeddings.
        max_new_tokens: the longest answer.
        batch_size: questions in one pass, of the attack and of the answers.
        progress: see `attack_questions`.

    Raises:
        ImportError, AttackError, EvaluationError: as for `encode_questions`, `attack_questions` and `answer_scores`.
    """
    questions = encode_questions(tokenizer, passages)
    attacked = attack_questions(
        surrogate or model, tokenizer, questions, attack, batch_size=batch_size, progress=progress
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    clean, clean_exact = answer_scores(model, tokenizer, questions, clean_prompts(model, questions), **options)
    adversarial, adversarial_exact = answer_scores(model, tokenizer, questions, attacked, **options)
    groups = torch.arange(len(questions)) // batch_size
    return Robustness(clean, adversarial, (clean_exact, adversarial_exact), groups)


def _encode(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> Question:
    text, is_chat = passage.prompt, bool(getattr(tokenizer, "chat_template", None))
    if is_chat:
        chat = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not is_chat)
    question = set(_tokens(tokenizer, passage.question)) | set(_tokens(tokenizer, " " + passage.question))
    answers = [set(_tokens(tokenizer, space + answer)) for answer in passage.answers for space in ("", " ")]
    first = text.index(passage.context)
    protected = [span for answer in passage.answers for span in _occurrences(text, answer)]
    free = tuple(
        first <= start < end <= first + len(passage.context)
        and token not in question
        and not any(start < right and left < end for left, right in protected)
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    )
    if not any(free):
        raise EvaluationError(
            f"{passage.question!r}: its passage is nothing but its answer, so there is nothing to attack"
        )
    answer = _tokens(tokenizer, ("" if is_chat else " ") + passage.answers[0])
    return Question(
        tuple(encoding["input_ids"]), free, tuple(answer), frozenset(question.union(*answers)), passage.answers
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def _occurrences(text: str, part: str) -> list[tuple[int, int]]:
    found, start = [], text.find(part)
    while part and start >= 0:
        found.append((start, start + len(part)))
        start = text.find(part, start + 1)
    return found


def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> Batch:
    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(model.device)

    whole = [[*question.prompt, *question.answer] for question in questions]
    labels = [[IGNORED] * len(question.prompt) + list(question.answer) for question in questions]
    free = [[*map(int, question.free), *[0] * len(question.answer)] for question in questions]
    table = model.get_input_embeddings()
    candidates = torch.ones(len(questions), table.num_embeddings, dtype=torch.bool, device=model.device)
    candidates[:, len(tokenizer) :] = False
    candidates[:, sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})] = False
    for row, question in enumerate(questions):
        candidates[row, sorted(question.barred)] = False
    mask = padded([[1] * len(row) for row in whole], 0)
    return Batch(padded(whole, 0), mask, padded(labels, IGNORED), padded(free, 0).bool(), candidates)


def _embeddings(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        embeddings: Tensor = model.get_input_embeddings()(tokens)
    return embeddings
