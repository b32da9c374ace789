from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers

PROMPTS = ["Name a colour.", "Why?", "What is the capital of Japan, and how many people live there?", "Count."]


def greedy(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """By hand: one prompt, no cache, no padding."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_say_what_each_prompt_alone_says(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    expected = [greedy(model, tokenizer(prompt)["input_ids"], 12) for prompt in PROMPTS]
    assert [list(answer.tokens) for answer in answers] == expected
    assert [answer.text for answer in answers] == [tokenizer.decode(tokens) for tokens in expected]


def test_a_chat_template_is_used(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (answer,) = generate_answers(model, chat_tokenizer, ["Why?"], max_new_tokens=8)
    prompt = chat_tokenizer("[user] Why?\n[assistant] ")["input_ids"]
    assert list(answer.tokens) == greedy(model, prompt, 8)


def test_an_answer_ends_at_the_stop_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12)
    stop = whole[0].tokens[5]
    ended = LlamaForCausalLM(model.config)
    ended.load_state_dict(model.state_dict())
    ended.generation_config.eos_token_id = [stop, 256]
    for answer, all_of_it in zip(generate_answers(ended, tokenizer, PROMPTS, max_new_tokens=12), whole, strict=True):
        tokens = all_of_it.tokens
        assert answer.tokens == (tokens[: tokens.index(stop)] if stop in tokens else tokens)


def test_nothing_is_left_changed(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=40)
    trained = LlamaForCausalLM(model.config).train()
    trained.load_state_dict(model.state_dict())
    trained.generation_config.repetition_penalty = 50.0
    tokenizer.padding_side = "right"
    assert generate_answers(trained, tokenizer, PROMPTS, max_new_tokens=40) == expected
    assert trained.training
    assert trained.generation_config.repetition_penalty == 50.0
    assert tokenizer.padding_side == "right"


def test_bad_input(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="no prompts"):
        generate_answers(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="'' tokenizes to nothing"):
        generate_answers(model, tokenizer, [""])
    with pytest.raises(EvaluationError, match="max_new_tokens 0, batch_size 16"):
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(EvaluationError, match="batch_size 0"):
        generate_answers(model, tokenizer, PROMPTS, batch_size=0)
