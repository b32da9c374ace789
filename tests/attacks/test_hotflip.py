"""HotFlip: its choice against brute force over positions and vocabulary, and what it never touches."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_model import PoolingModel
from torch import Tensor

from optimum_qguard.attacks.answer_loss import answer_loss, loss_and_gradient
from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.hotflip import hotflip

VOCABULARY = 23
LENGTH = 7


def batch(seed: int) -> dict[str, Tensor]:
    """Three samples of seven tokens; the last is the answer's, and of the others some may change."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.rand(3, LENGTH, generator=generator) < 0.6
    mask[:, 1], mask[:, -1] = True, False
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = input_ids[:, -1]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels, "mask": mask}


def losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return answer_loss(model, model.embed(input_ids), torch.ones_like(input_ids), labels)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_the_first_flip_is_brute_forces(seed: int) -> None:
    model, inputs = PoolingModel(VOCABULARY, 5), batch(seed)
    usable = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed)) < 0.5
    usable[seed % VOCABULARY] = True
    table = model.embed.weight.detach()
    tokens = inputs["input_ids"]
    _, gradient = loss_and_gradient(model, table[tokens], inputs["attention_mask"], inputs["labels"])
    found = hotflip(model, **inputs, flips=1, candidates=usable)
    for row in range(3):
        best = max(
            (float((table[new] - table[tokens[row, position]]) @ gradient[row, position]), position, new)
            for position, new in product(range(LENGTH), range(VOCABULARY))
            if inputs["mask"][row, position] and usable[new] and new != tokens[row, position]
        )
        expected = tokens[row].clone()
        expected[best[1]] = best[2]
        before, after = losses(model, torch.stack([tokens[row], expected]), inputs["labels"][[row, row]])
        assert torch.equal(found[row], expected if after > before else tokens[row])


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), flips=st.integers(1, 9), tries=st.integers(1, 4))
def test_forbidden_positions_and_tokens_are_never_touched(seed: int, flips: int, tries: int) -> None:
    model, inputs = PoolingModel(VOCABULARY, 5), batch(seed)
    usable = torch.rand(3, VOCABULARY, generator=torch.Generator().manual_seed(seed)) < 0.3
    usable[:, 4] = True
    found = hotflip(model, **inputs, flips=flips, candidates=usable, tries=tries)
    changed = found != inputs["input_ids"]
    assert not (changed & ~inputs["mask"]).any()
    assert (changed.sum(1) <= flips).all()
    assert usable.gather(1, found)[changed].all()
    assert (losses(model, found, inputs["labels"]) >= losses(model, inputs["input_ids"], inputs["labels"])).all()


def test_with_enough_tries_the_flip_is_the_best_of_all() -> None:
    model, inputs = PoolingModel(VOCABULARY, 5), batch(3)
    found = hotflip(model, **inputs, flips=1, tries=VOCABULARY * LENGTH)
    for row in range(3):
        everything = inputs["input_ids"][row].repeat(VOCABULARY * LENGTH, 1)
        for index, (position, new) in enumerate(product(range(LENGTH), range(VOCABULARY))):
            if inputs["mask"][row, position]:
                everything[index, position] = new
        highest = losses(model, everything, inputs["labels"][row].expand_as(everything)).max()
        torch.testing.assert_close(losses(model, found[row][None], inputs["labels"][row][None])[0], highest)


def test_more_flips_are_a_higher_loss() -> None:
    model, inputs = PoolingModel(VOCABULARY, 5), batch(3)
    inputs["mask"][:, :-1] = True
    one, three = (losses(model, hotflip(model, **inputs, flips=flips), inputs["labels"]) for flips in (1, 3))
    assert (three > one).all()


def test_a_position_changes_once() -> None:
    model = PoolingModel(VOCABULARY, 5)
    for seed in range(20):
        inputs = batch(seed)
        inputs["mask"] = torch.arange(LENGTH).expand(3, -1) == 2
        assert torch.equal(hotflip(model, **inputs, flips=4), hotflip(model, **inputs, flips=1))


def test_views_enter_while_it_chooses() -> None:
    model, inputs = PoolingModel(VOCABULARY, 5), batch(3)
    entered: list[int] = []

    class Counted(nullcontext):
        def __enter__(self) -> None:
            entered.append(1)

    plain = hotflip(model, **inputs, flips=2)
    assert torch.equal(hotflip(model, **inputs, flips=2, views=[Counted, Counted]), plain)
    assert len(entered) == 2 * (1 + 2 * 2), "the start, and a gradient and a try for each flip"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flips": 0}, "at least 1 of each"),
        ({"tries": 0}, "at least 1 of each"),
        ({"candidates": torch.zeros(VOCABULARY)}, "must allow a token"),
        ({"candidates": torch.ones(5)}, r"be \(23,\) or \(3, 23\)"),
        ({"mask": torch.zeros(3, LENGTH)}, "mask must let"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AttackError, match=message):
        hotflip(PoolingModel(VOCABULARY, 5), **{**batch(3), **change})
