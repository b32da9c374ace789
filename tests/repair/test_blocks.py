"""Text cut into blocks, and the order in which they are trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from optimum_qguard.repair.blocks import Blocks, passes, token_blocks
from optimum_qguard.repair.errors import RepairError


@pytest.fixture(scope="module")
def tokenizer(clean: Path) -> Any:
    """Of words: w7 is token 7, and 1 ends a text."""
    return AutoTokenizer.from_pretrained(clean)


def test_blocks_are_the_text(tokenizer: Any) -> None:
    text = " ".join(f"w{index}" for index in range(10, 27))
    assert torch.equal(token_blocks(tokenizer, text, 4), torch.arange(10, 26).view(4, 4))


def test_texts_follow_each_other_with_an_end_between(tokenizer: Any) -> None:
    assert token_blocks(tokenizer, ["w2 w3", "w4 <end>", "w5 w6"], 7).tolist() == [[2, 3, 1, 4, 1, 5, 6]]


def test_less_than_a_block(tokenizer: Any) -> None:
    with pytest.raises(RepairError, match="the validation text has 3 tokens, and one block needs 4; give more text"):
        token_blocks(tokenizer, "w2 w3 w4", 4, name="the validation text")
    with pytest.raises(RepairError, match="the text has 0 tokens"):
        token_blocks(tokenizer, [], 4)


@pytest.mark.parametrize(("n_blocks", "n_examples"), [(7, 7), (7, 3), (7, 20), (1, 4)])
def test_every_block_comes_before_any_comes_again(n_blocks: int, n_examples: int) -> None:
    order = passes(n_blocks, n_examples, seed=3)
    assert len(order) == n_examples
    for start in range(0, n_examples, n_blocks):
        part = order[start : start + n_blocks].tolist()
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(n_blocks))


def test_fewer_examples_are_the_first_of_more() -> None:
    assert torch.equal(passes(7, 10, seed=3), passes(7, 25, seed=3)[:10])
    assert not torch.equal(passes(50, 50, seed=3), passes(50, 50, seed=4))


def test_each_block_predicts_itself() -> None:
    blocks = torch.arange(6).view(3, 2)
    examples = Blocks(blocks, torch.tensor([2, 0, 2, 1]))
    assert [examples[index]["input_ids"].tolist() for index in range(len(examples))] == [[4, 5], [0, 1], [4, 5], [2, 3]]
    assert torch.equal(examples[0]["labels"], examples[0]["input_ids"])
    assert len(Blocks(blocks)) == 3
