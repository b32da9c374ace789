"""Whether a model knows the answer: multiple choice by likelihood, arithmetic by generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_qguard.evaluate.arithmetic import Problem, final_number
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.mode import evaluation_mode
from optimum_qguard.evaluate.multiple_choice import MultipleChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Shares of questions whose right choice was the likeliest, from 0 to 1.

    Attributes:
        accuracy: by the log-likelihood of the whole choice.
        accuracy_normalized: by that divided by the choice's length in characters (as lm-evaluation-harness's acc_norm).
        n: how many questions.
    """

    accuracy: float
    accuracy_normalized: float
    n: int


@dataclass(frozen=True)
class ExactMatch:
    """Arithmetic problems solved.

    Attributes:
        accuracy: share of answers whose last number is the right one, from 0 to 1.
        answers: the model's texts.
    """

    accuracy: float
    answers: tuple[str, ...]

    @property
    def n(self) -> int:
        """How many problems."""
        return len(self.answers)


def multiple_choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[MultipleChoice]
) -> ChoiceAccuracy:
    """Accuracy without generation: which choice does the model find likeliest after the question?

    Args:
        model: a causal language model; its mode is set to evaluation and back.
        tokenizer: its tokenizer.
        questions: at least one.

    Raises:
        EvaluationError: no questions, or one whose context has no tokens.
    """
    if not questions:
        raise EvaluationError("no questions: at least one is needed")
    right = right_normalized = 0
    for question in questions:
        scores = choice_log_likelihoods(model, tokenizer, question)
        lengths = torch.tensor([len(choice) for choice in question.choices], dtype=torch.float64)
        right += _is_highest(scores, question.answer)
        right_normalized += _is_highest(scores / lengths, question.answer)
    return ChoiceAccuracy(right / len(questions), right_normalized / len(questions), len(questions))


def choice_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: MultipleChoice
) -> Tensor:
    """``(n_choices,)`` float64: ``log p(choice | context)`` in nats.

    The context's keys and values are computed once; the choices then are one batch.

    Raises:
        EvaluationError: the context has no tokens.
    """
    whole = [tokenizer(f"{question.context} {choice}")["input_ids"] for choice in question.choices]
    # A token may straddle context and choice; it then belongs to the choice, for every choice.
    shared = _common_prefix([tokenizer(question.context)["input_ids"], *whole])
    if not shared:
        raise EvaluationError(f"the question {question.context!r} has no tokens before its choices")
    rests = [tokens[shared:] for tokens in whole]
    longest = max(map(len, rests))
    targets = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=model.device)
    is_target = torch.tensor([[1] * len(rest) + [0] * (longest - len(rest)) for rest in rests], device=model.device)
    with evaluation_mode(model), torch.no_grad():
        context = torch.tensor([whole[0][:shared]], device=model.device)
        first = model(context, use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(rests))
        # Padding is on the right, where no token looks.
        later = model(targets[:, :-1], past_key_values=cache, use_cache=True).logits if longest > 1 else None
    logits = first.logits[:, -1:].expand(len(rests), -1, -1)
    if later is not None:
        logits = torch.cat([logits, later], dim=1)
    log_p: Tensor = logits.double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (log_p * is_target).sum(1).cpu()


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> ExactMatch:
    """Arithmetic by greedy generation: the last number of an answer is the model's result.

    Args:
        model, tokenizer, max_new_tokens, batch_size: as for `generate_answers`.
        problems: at least one.

    Raises:
        EvaluationError: as for `generate_answers`.
    """
    prompts = [problem.question for problem in problems]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    texts = tuple(answer.text for answer in answers)
    right = sum(final_number(text) == problem.answer for text, problem in zip(texts, problems, strict=True))
    return ExactMatch(right / len(problems), texts)


def _is_highest(scores: Tensor, index: int) -> bool:
    """Higher than every other: a broken model, whose scores are equal or NaN, knows nothing."""
    return int((scores[index] > scores).sum()) == len(scores) - 1


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
