"""Text as blocks of tokens, all of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from optimum_qguard.repair.errors import RepairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Blocks(Dataset[dict[str, Tensor]]):
    """Examples for a causal language model: each block predicts itself.

    Args:
        blocks: ``(n_blocks, block_size)`` tokens.
        order: which block each example is; by default each once.
    """

    def __init__(self, blocks: Tensor, order: Tensor | None = None) -> None:
        self.blocks = blocks
        self.order = torch.arange(len(blocks)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[self.order[index]]
        return {"input_ids": block, "labels": block}


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], block_size: int, *, name: str = "the text"
) -> Tensor:
    """``(n_blocks, block_size)`` tokens, int64; last tokens that fill no block are left out.

    Args:
        text: one or several, which follow each other with the end-of-sequence token between them.
        name: of the text, for the error.

    Raises:
        RepairError: fewer tokens than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    for each in [text] if isinstance(text, str) else text:
        if pieces and end and pieces[-1][-1:].tolist() != end:
            pieces.append(torch.tensor(end))
        pieces.append(torch.tensor(tokenizer(each, verbose=False)["input_ids"], dtype=torch.int64))
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    n_blocks = len(tokens) // block_size
    if n_blocks == 0:
        raise RepairError(
            f"{name} has {len(tokens)} tokens, and one block needs {block_size}; give more text or a smaller block size"
        )
    return tokens[: n_blocks * block_size].view(n_blocks, block_size)


def passes(n_blocks: int, n_examples: int, seed: int) -> Tensor:
    """Indices of ``n_examples`` blocks: all of them in random order, then all of them in another one, and so on.

    With one seed, fewer examples are the first of more.
    """
    generator = torch.Generator().manual_seed(seed)
    n_passes = -(-n_examples // n_blocks)
    return torch.cat([torch.randperm(n_blocks, generator=generator) for _ in range(n_passes)])[:n_examples]
