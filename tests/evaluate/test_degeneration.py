from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.degeneration import degeneration, longest_run, max_repeat, seq_rep
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers

TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(TOKENS)
def test_longest_run_is_the_papers_formula(s: list[int]) -> None:
    n = len(s)
    expected = max(
        (sum(math.prod(int(s[r] == s[r - 1]) for r in range(i + 1, j + 1)) for j in range(i, n)) for i in range(n)),
        default=0,
    )
    assert longest_run(s) == expected


@given(TOKENS, st.integers(1, 4))
def test_max_repeat_is_the_longest_power_of_an_n_gram(tokens: list[int], n: int) -> None:
    streaks = [
        k
        for start, k in product(range(len(tokens)), range(1, len(tokens) // n + 1))
        if start + k * n <= len(tokens) and tokens[start : start + k * n] == tokens[start : start + n] * k
    ]
    assert max_repeat(tokens, n) == max(streaks, default=0)


@given(TOKENS, st.integers(1, 4))
def test_seq_rep_counts_what_was_there_before(tokens: list[int], n: int) -> None:
    words = ["".join(map(str, tokens[start : start + n])) for start in range(max(0, len(tokens) - n + 1))]
    repeated = sum(word in words[:index] for index, word in enumerate(words))
    assert seq_rep(tokens, n) == pytest.approx(repeated / max(1, len(words)))


@pytest.mark.parametrize(
    ("text", "streak"),
    [
        ("a b c a b c a b c", 3),
        ("x a b c a b c y", 2),
        ("a b c d a b c d", 1),
        ("no no no no no no no", 2),
        ("so good so good so good", 1),
        ("a b", 0),
        ("", 0),
    ],
)
def test_max_repeat_3_by_hand(text: str, streak: int) -> None:
    assert max_repeat(text.split()) == streak


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d e f", 0), ("a a a a a", 1 / 2), ("a b c d a b c d", 1 / 5), ("a b c", 0), ("", 0)],
)
def test_seq_rep_4_by_hand(text: str, share: float) -> None:
    assert seq_rep(text.split()) == pytest.approx(share)


def test_means_over_the_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["One.", "Two, please.", "Three"]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=40)
    found = degeneration(model, tokenizer, prompts, max_new_tokens=40, batch_size=2)
    assert found.max_repeat == pytest.approx(sum(max_repeat(answer.tokens) for answer in answers) / 3)
    assert found.seq_rep == pytest.approx(sum(seq_rep(answer.tokens) for answer in answers) / 3)
    assert found.n == 3


def test_bad_input(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for figure in (max_repeat, seq_rep):
        with pytest.raises(EvaluationError, match="n 0: an n-gram has at least one token"):
            figure([1, 2, 3], 0)
    with pytest.raises(EvaluationError, match="no prompts"):
        degeneration(model, tokenizer, [])
