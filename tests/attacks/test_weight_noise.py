"""Noise that multiplies perplexity as wanted, or a model as it was."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.weight_noise import add_weight_noise, linear_weights, next_sigma, noisy

TOKENS = torch.arange(0, 128).remainder(61).view(2, 64)


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    """A tiny Llama that has learned to count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=64,
                tie_word_embeddings=False,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(30):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def perplexity(model: LlamaForCausalLM) -> float:
    with torch.no_grad():
        return math.exp(float(model(TOKENS, labels=TOKENS).loss))


@pytest.fixture
def model(trained: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = LlamaForCausalLM(trained.config)
    copied.load_state_dict(trained.state_dict())
    return copied.eval()


@pytest.mark.parametrize("ratio", [1.05, 1.5, 5.0])
def test_the_ratio_is_met(ratio: float, model: LlamaForCausalLM, trained: LlamaForCausalLM) -> None:
    found = add_weight_noise(model, perplexity, ratio, seed=1)
    assert perplexity(model) / perplexity(trained) == pytest.approx(ratio, rel=0.0101)
    assert found.ratio == pytest.approx(perplexity(model) / perplexity(trained))
    assert set(found.tensors) == {f"{name}.weight" for name, _ in model.named_modules() if name.endswith("proj")}
    for name, parameter in trained.named_parameters():
        expected = noisy(parameter.data, found.sigma, 1, name) if name in found.tensors else parameter
        assert torch.equal(model.get_parameter(name), expected)


def test_the_seed_decides() -> None:
    weight = torch.zeros(200, 200)
    assert torch.equal(noisy(weight, 0.5, 1, "a"), noisy(weight, 0.5, 1, "a"))
    for other in (noisy(weight, 0.5, 2, "a"), noisy(weight, 0.5, 1, "b")):
        assert float((other * noisy(weight, 0.5, 1, "a")).mean()) == pytest.approx(0, abs=0.01)
        assert float(other.std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(("slope", "offset", "ratio"), [(400.0, 0.0, 1.1), (3.0, 0.02, 2.0), (1e6, -0.01, 1.3)])
def test_the_fit_solves_the_model_that_it_assumes(slope: float, offset: float, ratio: float) -> None:
    """``log r = a sigma**2 + b`` exactly: two measurements suffice."""
    solution = math.sqrt((math.log(ratio) - offset) / slope)
    measured = {sigma: math.exp(slope * sigma**2 + offset) for sigma in (0.9 * solution, 1.1 * solution)}
    assert next_sigma(measured, ratio) == pytest.approx(solution)


@pytest.mark.parametrize(
    "curve",
    [
        lambda sigma: math.exp(min(sigma**4, 700)),
        lambda sigma: 1 + sigma,
        lambda sigma: math.inf if sigma > 3 else 1 + 1e-3 * sigma,
        lambda sigma: math.nan if sigma > 3 else 1 + 0.2 * sigma**3,
    ],
)
def test_other_curves_are_found_too(curve: Callable[[float], float]) -> None:
    wanted = curve(2.5)
    measured = {1e-3: curve(1e-3)}
    while abs(list(measured.values())[-1] / wanted - 1) > 1e-4 and len(measured) < 60:
        sigma = next_sigma(measured, wanted)
        assert sigma not in measured
        measured[sigma] = curve(sigma)
    assert abs(list(measured.values())[-1] / wanted - 1) <= 1e-4


def test_no_convergence_says_its_rates_and_restores(model: LlamaForCausalLM, trained: LlamaForCausalLM) -> None:
    calls = iter([1.0, 7.0, 7.0, 7.0])
    with pytest.raises(AttackError, match=r"ratio of 2 within .* in 3 rounds; ratios by sigma: .*: 7, .*: 7, .*: 7"):
        add_weight_noise(model, lambda _: next(calls), 2.0, rounds=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))

    def interrupted(_: object) -> float:
        if measured:
            raise KeyboardInterrupt
        measured.append(1.0)
        return 1.0

    measured: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        add_weight_noise(model, interrupted, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_what_makes_no_sense_is_refused(model: LlamaForCausalLM) -> None:
    for ratio in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(AttackError, match="greater than 1"):
            add_weight_noise(model, perplexity, ratio)
    with pytest.raises(AttackError, match="no linear layers"):
        add_weight_noise(torch.nn.Embedding(3, 3), perplexity, 2.0)
    with pytest.raises(AttackError, match="clean model's perplexity is nan"):
        add_weight_noise(model, lambda _: math.nan, 2.0)
    assert "lm_head.weight" not in linear_weights(model)
