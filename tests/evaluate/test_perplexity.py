from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_qguard.evaluate.perplexity import kl_divergence, next_token_logits, perplexity, perplexity_and_kl


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % 50 for character in text]}


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config).eval()


TEXT = "The half-width of a cell is half the distance between its bounds." * 2


def log_probs(model: LlamaForCausalLM, context: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return log_softmax(model(torch.tensor([context])).logits[0, -1].double(), -1)


def test_one_window_is_the_models_own_loss() -> None:
    model = tiny_model(0)
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert perplexity(model, tokenizer, TEXT) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "max_tokens"), [(16, 5, None), (16, 15, None), (8, 1, 40), (64, 32, 97), (130, 7, None)]
)
def test_every_token_is_predicted_once_with_enough_context(window: int, stride: int, max_tokens: int | None) -> None:
    model = tiny_model(1)
    tokens = tokenizer(TEXT)["input_ids"][:max_tokens]
    end, total = 0, 0.0
    for index in range(1, len(tokens)):
        if index >= end:
            end = min(window if end == 0 else end + stride, len(tokens))
        total -= float(log_probs(model, tokens[max(0, end - window) : index])[tokens[index]])
    expected = math.exp(total / (len(tokens) - 1))
    options = {"window": window, "stride": stride, "max_tokens": max_tokens}
    assert perplexity(model, tokenizer, TEXT, **options) == pytest.approx(expected, rel=1e-5)
    logits = next_token_logits(model, tokenizer, TEXT, **options)
    assert logits.shape == (len(tokens) - 1, 50)
    chosen = log_softmax(logits.double(), -1)[range(len(tokens) - 1), tokens[1:]]
    assert math.exp(-chosen.mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [2048, 16])
def test_kl_is_torchs(window: int) -> None:
    reference, model = tiny_model(2), tiny_model(3)
    options = {"window": window, "stride": 5}
    p, q = (
        log_softmax(next_token_logits(each, tokenizer, TEXT, **options).double(), -1) for each in (reference, model)
    )
    expected = kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert expected > 0.1
    assert kl_divergence(reference, model, tokenizer, TEXT, **options) == pytest.approx(expected, rel=1e-12)
    logits = next_token_logits(reference, tokenizer, TEXT, **options)
    assert kl_divergence(logits, model, tokenizer, TEXT, **options) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(model, model, tokenizer, TEXT, **options) == 0
    both = perplexity_and_kl(logits, model, tokenizer, TEXT, **options)
    assert both.kl == pytest.approx(expected, rel=1e-12)
    assert both.perplexity == perplexity(model, tokenizer, TEXT, **options)


def test_a_collapsed_model_has_a_perplexity() -> None:
    model = tiny_model(7)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, tokenizer, TEXT) == math.inf


def test_chunks_of_a_long_text() -> None:
    model, text = tiny_model(4), TEXT * 8
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokens.numel() > 512
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert perplexity(model, tokenizer, text) == pytest.approx(math.exp(loss), rel=1e-5)


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = tiny_model(5)
    expected = perplexity(model, tokenizer, TEXT)
    assert not model.training
    assert perplexity(model.train(), tokenizer, TEXT) == expected
    assert model.training


def test_bad_input() -> None:
    model = tiny_model(6)
    with pytest.raises(ValueError, match=r"1 token\(s\)"):
        perplexity(model, tokenizer, "a")
    with pytest.raises(ValueError, match=r"0 token\(s\)"):
        perplexity(model, tokenizer, "")
    for stride in (0, 8):
        with pytest.raises(ValueError, match=f"stride {stride}"):
            perplexity(model, tokenizer, TEXT, window=8, stride=stride)
    logits = next_token_logits(model, tokenizer, TEXT)
    with pytest.raises(ValueError, match="reference logits are for"):
        kl_divergence(logits, model, tokenizer, TEXT, max_tokens=9)
    with pytest.raises(ValueError, match="vocabularies differ: 49 in the reference, 50 in the model"):
        kl_divergence(logits[:, :49], model, tokenizer, TEXT)
