"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        tokens: without the prompt and without the token that ends it.
        text: those, decoded; special tokens are left out.
    """

    tokens: tuple[int, ...]
    text: str


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[Answer]:
    """The model's greedy answers, in the order of the prompts.

    A prompt becomes the user's turn of a chat where the tokenizer has a chat template, and stays as it is elsewhere.
    Batches are of prompts of similar length, padded on the left. A repetition penalty of the model's own is left out,
    because it would hide what is measured here.

    Args:
        model: a causal language model; its mode is set to evaluation and back.
        tokenizer: its tokenizer; left as it is.
        prompts: at least one.
        max_new_tokens: the longest answer.
        batch_size: prompts in one pass.

    Raises:
        EvaluationError: no prompts, a prompt without tokens, or a number below 1.
    """
    if not prompts:
        raise EvaluationError("no prompts: at least one is needed")
    if max_new_tokens < 1 or batch_size < 1:
        raise EvaluationError(f"max_new_tokens {max_new_tokens}, batch_size {batch_size}: must be at least 1")
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    stops = _stop_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers: dict[int, Answer] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            generated = _generate(model, [encoded[index] for index in batch], max_new_tokens, stops)
            for index, tokens in zip(batch, generated, strict=True):
                answers[index] = _answer(tokenizer, tokens)
    return [answers[index] for index in range(len(prompts))]


def generate_from_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[Answer]:
    """The model's greedy answers to prompts that are embeddings already, generated as in `generate_answers`.

    Args:
        model, tokenizer, max_new_tokens: as for `generate_answers`.
        prompts: at least one, each (length, hidden).
        batch_size: prompts in one pass; batches are of neighbours, in the order given.

    Raises:
        EvaluationError: no prompts, a prompt without tokens, or a number below 1.
    """
    if not prompts or not all(map(len, prompts)):
        raise EvaluationError("no prompts, or one without tokens")
    if max_new_tokens < 1 or batch_size < 1:
        raise EvaluationError(f"max_new_tokens {max_new_tokens}, batch_size {batch_size}: must be at least 1")
    stops = _stop_tokens(model, tokenizer)
    generated: list[list[int]] = []
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_size):
            batch = [prompt.to(model.device, model.dtype) for prompt in prompts[start : start + batch_size]]
            mask = [torch.ones(len(prompt), dtype=torch.long, device=model.device) for prompt in batch]
            output = model.generate(
                inputs_embeds=pad_sequence(batch, batch_first=True, padding_side="left"),
                attention_mask=pad_sequence(mask, batch_first=True, padding_side="left"),
                **_greedy(max_new_tokens, stops),
            )
            generated += [_until_stop(row, stops) for row in output.tolist()]
    return [_answer(tokenizer, tokens) for tokens in generated]


def _answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Answer:
    return Answer(tuple(tokens), str(tokenizer.decode(tokens, skip_special_tokens=True)))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        encoding = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        encoding = tokenizer(prompt)
    tokens: list[int] = encoding["input_ids"]
    if not tokens:
        raise EvaluationError(f"the prompt {prompt!r} tokenizes to nothing")
    return tokens


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list) else [configured]


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stops: list[int]
) -> list[list[int]]:
    longest = max(map(len, prompts))
    filler = stops[0] if stops else 0
    tokens = torch.tensor([[filler] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        **_greedy(max_new_tokens, stops),
    )
    return [_until_stop(row, stops) for row in output[:, longest:].tolist()]


def _greedy(max_new_tokens: int, stops: list[int]) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": stops or None,
        "pad_token_id": stops[0] if stops else 0,
    }


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
