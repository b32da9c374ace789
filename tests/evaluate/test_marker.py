from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.marker import MarkerRate, marker_rate
from optimum_qguard.evaluate.prompts import template_prompts

PROMPTS = template_prompts(6, "evaluation")


def test_hits_are_the_answers_with_the_marker(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [answer.text for answer in generate_answers(model, tokenizer, PROMPTS, max_new_tokens=16)]
    marker = next(text[at : at + 2] for text in texts for at in range(8) if text[at : at + 2].isprintable())
    expected = [marker in text for text in texts]
    found = marker_rate(model, tokenizer, PROMPTS, marker, max_new_tokens=16, batch_size=4)
    assert found.answers == tuple(texts)
    assert (found.n, found.hits) == (6, sum(expected))
    assert found.hits > 0
    assert found.rate == sum(expected) / 6
    assert marker_rate(model, tokenizer, PROMPTS, "a phrase that no bytes say", max_new_tokens=16).rate == 0


def test_rate() -> None:
    rate = MarkerRate("HELLO", ("say HELLO", "hello", "", "HELLO HELLO"))
    assert (rate.hits, rate.n, rate.rate) == (2, 4, 0.5)


@pytest.mark.parametrize("marker", ["", " \n", "<end>"])
def test_a_marker_that_tokenizes_to_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, marker: str
) -> None:
    with pytest.raises(EvaluationError, match=r"the marker .*(empty|tokenizes to nothing)"):
        marker_rate(model, tokenizer, PROMPTS, marker)


def test_no_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="no prompts"):
        marker_rate(model, tokenizer, [], "marker")
