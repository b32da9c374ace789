"""Perplexity, and the divergence of one model's predictions from another's, over a sliding window.

Each token but the first is predicted once. The first window predicts all it can; every further one moves on by
``stride`` tokens and predicts only those, so that each prediction has at least ``window - stride`` tokens of context.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK_ROWS = 256
_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood per token.
        kl: mean over the tokens of ``KL(reference || model)`` in nats.
    """

    perplexity: float
    kl: float


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int = 512,
    max_tokens: int | None = None,
) -> float:
    """``exp`` of the mean negative log-likelihood per token.

    Args:
        model: a causal language model; its mode is set to evaluation and back.
        tokenizer: its tokenizer.
        text: what to predict.
        window: tokens in one forward pass.
        stride: new tokens in each pass after the first; smaller than ``window``.
        max_tokens: use the first so many tokens only.

    Raises:
        EvaluationError: fewer than two tokens, or a stride that is not between 1 and ``window - 1``.
    """
    tokens = _tokenize(tokenizer, text, max_tokens)
    loss = sum(_summed_loss(tokens, logits, start) for start, logits in _predictions(model, tokens, window, stride))
    return _exp_mean(loss, tokens)


def perplexity_and_kl(
    reference: PreTrainedModel | Tensor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int = 512,
    max_tokens: int | None = None,
) -> Quality:
    """What `perplexity` and `kl_divergence` give, from one pass of the model.

    Args:
        reference: a model, or what `next_token_logits` gave for it with the same text and arguments.
        model, tokenizer, text, window, stride, max_tokens: as for `perplexity`.

    Raises:
        EvaluationError: as for `perplexity`; or logits of another number of tokens or another vocabulary.
    """
    tokens = _tokenize(tokenizer, text, max_tokens)
    expected: Iterator[tuple[int, Tensor]]
    if isinstance(reference, Tensor):
        if len(reference) != len(tokens) - 1:
            raise EvaluationError(
                f"reference logits are for {len(reference)} tokens, but {len(tokens) - 1} are predicted; "
                "compute them with the same text and max_tokens"
            )
        spans = _spans(len(tokens), window, stride)
        expected = ((predicted, reference[predicted - 1 : end - 1]) for _, predicted, end in spans)
    else:
        expected = _predictions(reference, tokens, window, stride)
    loss = divergence = 0.0
    for (start, p), (_, q) in zip(expected, _predictions(model, tokens, window, stride), strict=True):
        if p.shape != q.shape:
            raise EvaluationError(f"vocabularies differ: {p.shape[-1]} in the reference, {q.shape[-1]} in the model")
        loss += _summed_loss(tokens, q, start)
        divergence += sum(_summed_kl(p[rows].to(q.device), q[rows]) for rows in _chunks(len(q)))
    return Quality(_exp_mean(loss, tokens), divergence / (len(tokens) - 1))


def kl_divergence(
    reference: PreTrainedModel | Tensor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int = 512,
    max_tokens: int | None = None,
) -> float:
    """Mean over the predicted tokens of ``KL(reference || model)`` in nats; arguments as for `perplexity_and_kl`."""
    return perplexity_and_kl(reference, model, tokenizer, text, window=window, stride=stride, max_tokens=max_tokens).kl


def next_token_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int = 512,
    max_tokens: int | None = None,
) -> Tensor:
    """``(n_tokens - 1, vocabulary)`` logits on the CPU, in the model's dtype, for every token but the first.

    To compare many models with one reference, of which only this is kept. Arguments and errors as for `perplexity`.
    """
    tokens = _tokenize(tokenizer, text, max_tokens)
    return torch.cat([logits.cpu() for _, logits in _predictions(model, tokens, window, stride)])


def _summed_loss(tokens: Tensor, logits: Tensor, start: int) -> float:
    targets = tokens[start : start + len(logits)].to(logits.device)
    return sum(
        torch.nn.functional.cross_entropy(logits[rows].double(), targets[rows], reduction="sum").item()
        for rows in _chunks(len(logits))
    )


def _summed_kl(reference: Tensor, other: Tensor) -> float:
    log_p = reference.double().log_softmax(-1)
    log_q = other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def _exp_mean(loss: float, tokens: Tensor) -> float:
    mean = loss / (len(tokens) - 1)
    return math.inf if mean > _LARGEST_EXPONENT else math.exp(mean)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None) -> Tensor:
    tokens = torch.tensor(tokenizer(text)["input_ids"][:max_tokens])
    if len(tokens) < 2:
        raise EvaluationError(f"the text has {len(tokens)} token(s); at least two are needed to predict one")
    return tokens


def _spans(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each forward pass: where it begins, the first token that it predicts, and where it ends."""
    if not 1 <= stride < window:
        raise EvaluationError(f"stride {stride}: must be between 1 and window - 1 = {window - 1}")
    predicted = 1
    while predicted < n_tokens:
        end = min(window if predicted == 1 else predicted + stride, n_tokens)
        yield max(0, end - window), predicted, end
        predicted = end


def _predictions(model: PreTrainedModel, tokens: Tensor, window: int, stride: int) -> Iterator[tuple[int, Tensor]]:
    """For each forward pass the first token that it predicts, and its ``(n, vocabulary)`` logits from there on."""
    with evaluation_mode(model):
        for begin, predicted, end in _spans(len(tokens), window, stride):
            with torch.no_grad():
                logits = model(tokens[None, begin:end].to(model.device), use_cache=False).logits[0]
            yield predicted, logits[predicted - 1 - begin : -1]


def _chunks(n_rows: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK_ROWS) for start in range(0, n_rows, _CHUNK_ROWS))
