"""Projected gradient ascent: where it ends in closed form, its ball, and averages over views."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_model import PoolingModel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_qguard.attacks.answer_loss import answer_loss, loss_and_gradient, mean_loss
from optimum_qguard.attacks.embedding_pgd import embedding_pgd
from optimum_qguard.attacks.errors import AttackError

LENGTHS = (9, 6)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, initializer_range=0.3)
        )


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Two samples of different lengths; the last two tokens of each are its answer, the first and third may change."""
    input_ids = torch.randint(0, 64, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(max(LENGTHS)).expand(2, -1)
    length = torch.tensor(LENGTHS)[:, None]
    return {
        "input_ids": input_ids,
        "attention_mask": (positions < length).long(),
        "labels": input_ids.masked_fill((positions < length - 2) | (positions >= length), -100),
        "mask": (positions == 0) | (positions == 2),
    }


def loss_of(model: Any, embeddings: Tensor, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return answer_loss(model, embeddings, batch["attention_mask"], batch["labels"])


def test_the_loss_is_transformers_own_sample_by_sample(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    found = loss_of(model, model.transformer.wte(batch["input_ids"]), batch)
    for row, length in enumerate(LENGTHS):
        alone = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "labels")}
        torch.testing.assert_close(found[row], model(**alone).loss.detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 5])
def test_closed_form_of_a_linear_model(norm: Any, steps: int) -> None:
    """With two classes the loss grows along ``head[wrong] - head[right]`` everywhere, so the ball's end is known."""
    model = PoolingModel(20, 6, outputs=2)
    input_ids = torch.tensor([[3, 4, 5, 1], [7, 8, 9, 0]])
    labels = torch.tensor([[-100, -100, -100, 1], [-100, -100, -100, 0]])
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    found = embedding_pgd(
        model, input_ids, torch.ones_like(input_ids), labels, mask=mask, epsilon=0.5, steps=steps, step_size=0.5,
        norm=norm, random_start=False,
    )  # fmt: skip
    uphill = torch.stack([model.head[0] - model.head[1], model.head[1] - model.head[0]])[:, None]
    size = 0.5 * model.embed.weight.detach().square().mean().sqrt()
    change = (
        size * uphill.sign() if norm == "linf" else size * math.sqrt(6) * uphill / uphill.norm(dim=-1, keepdim=True)
    )
    torch.testing.assert_close(found, model.embed(input_ids).detach() + mask[..., None] * change)


@settings(max_examples=25)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(0, 3),
    steps=st.integers(1, 4),
    step_size=st.none() | st.floats(1e-3, 4),
    random_start=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stays_in_the_ball_and_the_loss_does_not_fall(
    model: GPT2LMHeadModel, batch: dict[str, Tensor], norm: Any, epsilon: float, steps: int, **options: Any
) -> None:
    clean = model.transformer.wte(batch["input_ids"]).detach()
    found = embedding_pgd(model, **batch, norm=norm, epsilon=epsilon, steps=steps, **options)
    change = found - clean
    size = epsilon * float(model.transformer.wte.weight.detach().square().mean().sqrt())
    lengths = change.abs().amax(-1) if norm == "linf" else change.norm(dim=-1) / math.sqrt(32)
    assert float(lengths.max()) <= size * (1 + 1e-5) + 1e-6
    assert torch.equal(found[~batch["mask"]], clean[~batch["mask"]])
    assert (loss_of(model, found, batch) >= loss_of(model, clean, batch) - 1e-5).all()


def test_more_room_is_a_higher_loss(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    losses = [
        loss_of(model, embedding_pgd(model, **batch, epsilon=epsilon, steps=10), batch) for epsilon in (0.0, 0.3, 1.0)
    ]
    assert (losses[0] + 0.05 < losses[1]).all()
    assert (losses[1] + 0.05 < losses[2]).all()


def test_the_seed_decides_where_it_starts(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    first, same, other = (embedding_pgd(model, **batch, epsilon=0.3, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@contextmanager
def scaled(model: GPT2LMHeadModel, factor: float) -> Iterator[None]:
    """One of its weights times ``factor``."""
    weight = model.transformer.h[0].mlp.c_fc.weight.data
    weight.mul_(factor)
    yield
    weight.div_(factor)


def test_gradients_are_averaged_over_views(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    embeddings = model.transformer.wte(batch["input_ids"]).detach()
    inputs = (model, embeddings, batch["attention_mask"], batch["labels"])
    views = [partial(scaled, model, factor) for factor in (1.0, 0.5, 4.0)]
    model.eval()
    each = [loss_and_gradient(*inputs, [view]) for view in views]
    losses, gradient = loss_and_gradient(*inputs, views)
    torch.testing.assert_close(losses, torch.stack([loss for loss, _ in each]).mean(0))
    torch.testing.assert_close(gradient, torch.stack([gradient for _, gradient in each]).mean(0))
    torch.testing.assert_close(mean_loss(*inputs, views), losses)
    assert not torch.allclose(each[0][1], each[2][1], rtol=0.1)
    assert torch.equal(loss_and_gradient(*inputs)[1], each[0][1]), "no views: the model as it is"


def test_a_step_follows_the_average_of_the_views(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    views = [partial(scaled, model, factor) for factor in (1.0, 4.0)]
    clean = model.transformer.wte(batch["input_ids"]).detach()
    model.eval()
    _, gradient = loss_and_gradient(model, clean, batch["attention_mask"], batch["labels"], views)
    found = embedding_pgd(model, **batch, epsilon=0.01, steps=1, step_size=0.01, random_start=False, views=views)
    size = 0.01 * model.transformer.wte.weight.detach().square().mean().sqrt()
    torch.testing.assert_close(found - clean, size * gradient.sign() * batch["mask"][..., None], rtol=1e-3, atol=1e-6)


def test_the_model_stays_as_it_was(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    with torch.no_grad():
        first = embedding_pgd(model, **batch, epsilon=0.3, steps=2)
    assert torch.equal(first, embedding_pgd(model, **batch, epsilon=0.3, steps=2)), "dropout was off"
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be at least 0"),
        ({"epsilon": math.nan}, "epsilon must be at least 0"),
        ({"steps": 0}, "steps at least 1"),
        ({"step_size": 0.0}, "more than 0"),
        ({"norm": "l1"}, "choose linf or l2"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "got shapes"),
        ({"labels": torch.full((2, 9), -100)}, "labels other than -100"),
        ({"labels": torch.zeros(2, 9, dtype=torch.long)}, "none at its first position"),
        ({"attention_mask": torch.tensor([[0] + [1] * 8] * 2)}, "pad on the right"),
        ({"mask": torch.zeros(2, 9, dtype=torch.bool)}, "mask must let"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "none of an answer"),
    ],
)
def test_what_makes_no_sense_is_refused(
    model: GPT2LMHeadModel, batch: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(AttackError, match=message):
        embedding_pgd(model, **{**batch, "epsilon": 0.3, **change})
