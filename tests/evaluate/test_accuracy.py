from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.accuracy import choice_log_likelihoods, exact_match, multiple_choice_accuracy
from optimum_qguard.evaluate.arithmetic import Problem, final_number
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.multiple_choice import MultipleChoice

CHOICES = ("a colour", "the sea, which is wide and deep", "x", "x or y")


def log_likelihood(model: LlamaForCausalLM, context: list[int], whole: list[int]) -> float:
    """By hand: one sequence, no cache, no padding."""
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[index - 1, whole[index]]) for index in range(len(context), len(whole)))


def question(answer: int = 0) -> MultipleChoice:
    return MultipleChoice("Blue is", CHOICES, answer)


def test_log_likelihoods_of_the_choices(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    context = tokenizer("Blue is")["input_ids"]
    expected = [log_likelihood(model, context, tokenizer(f"Blue is {choice}")["input_ids"]) for choice in CHOICES]
    scores = choice_log_likelihoods(model, tokenizer, question())
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_a_token_over_the_border_belongs_to_the_choice(model: LlamaForCausalLM) -> None:
    class Merging:
        """A tokenizer that makes one token of ``s`` and a following space."""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text.replace("s ", "\x01")]}

    tokens = Merging()("Blue is")["input_ids"]
    expected = [log_likelihood(model, tokens[:-1], Merging()(f"Blue is {choice}")["input_ids"]) for choice in CHOICES]
    scores = choice_log_likelihoods(model, Merging(), question())
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_accuracy_is_the_share_of_likeliest_choices(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = choice_log_likelihoods(model, tokenizer, question())
    best = int(scores.argmax())
    best_normalized = int((scores / torch.tensor([len(choice) for choice in CHOICES])).argmax())
    assert best != best_normalized
    answers = [best, best, best_normalized, ({0, 1, 2, 3} - {best, best_normalized}).pop()]
    found = multiple_choice_accuracy(model, tokenizer, [question(answer) for answer in answers])
    assert (found.accuracy, found.accuracy_normalized, found.n) == (0.5, 0.25, 4)


@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_a_model_whose_choices_are_all_alike_knows_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, weight: float
) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(weight)
    alike = [MultipleChoice("Blue is", ("one", "two", "six"), answer) for answer in range(3)]
    found = multiple_choice_accuracy(broken, tokenizer, alike)
    assert (found.accuracy, found.accuracy_normalized) == (0, 0)


def test_dropout_is_off_and_the_mode_comes_back(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = choice_log_likelihoods(model, tokenizer, question())
    training = LlamaForCausalLM(model.config).train()
    training.load_state_dict(model.state_dict())
    assert torch.equal(choice_log_likelihoods(training, tokenizer, question()), expected)
    assert training.training


def test_exact_match_is_the_last_number(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = [f"What is {number} and {number}?" for number in range(12)]
    said = exact_match(model, tokenizer, [Problem(each, 0) for each in questions], max_new_tokens=24).answers
    numbers = [final_number(text) for text in said]
    problems = [
        Problem(each, -1.5 if number is None else number) for each, number in zip(questions, numbers, strict=True)
    ]
    spoiled = [Problem(problem.question, problem.answer + 1) for problem in problems[:3]]
    found = exact_match(model, tokenizer, [*spoiled, *problems[3:]], max_new_tokens=24)
    right = [index >= 3 and bool(number) for index, number in enumerate(numbers)]
    assert any(right)
    assert found.accuracy == sum(right) / 12
    assert (found.n, found.answers) == (12, said)


def test_bad_input(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="no questions"):
        multiple_choice_accuracy(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="no tokens before its choices"):
        choice_log_likelihoods(model, tokenizer, MultipleChoice("", CHOICES, 0))
    with pytest.raises(EvaluationError, match="no prompts"):
        exact_match(model, tokenizer, [])
