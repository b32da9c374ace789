"""HotFlip: a few tokens of a context replaced by those that, to first order, raise the right answer's loss most.

The only payload is a wrong answer.

Source: Ebrahimi et al. 2018, "HotFlip: white-box adversarial examples for text classification", at the level of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_qguard.attacks.answer_loss import View, attacked, better, embedding_table, loss_and_gradient, mean_loss
from optimum_qguard.attacks.errors import AttackError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hotflip(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    mask: Tensor,
    flips: int = 3,
    candidates: Tensor | None = None,
    tries: int = 1,
    views: Sequence[View] = (),
) -> Tensor:
    """Tokens with at most ``flips`` replaced in each sample, greedily, each position at most once.

    Each flip is the one of highest `flip_scores`; with ``tries`` above 1, the one of highest loss among so many of the
    highest scores. Of the tokens on the way those with the largest loss are returned, so it is never below the clean
    sample's.

    Args:
        model, input_ids, attention_mask, labels, mask, views: as for `embedding_pgd`.
        flips: how many tokens to replace.
        candidates: which tokens may be put in, (vocabulary,) or for each sample (batch, vocabulary); by default all.
        tries: how many flips are tried out before one is made, a pass of the model each.

    Returns:
        (batch, length), in input_ids' dtype. What they decode to may be tokenized otherwise by a tokenizer.

    Raises:
        AttackError: numbers below 1, candidates of another shape or none, or tensors that do not fit together
            (`attacked`).
    """
    if flips < 1 or tries < 1:
        raise AttackError(f"{flips} flips, {tries} tries: at least 1 of each")
    table = embedding_table(model)
    vocabulary, batch = len(table), len(input_ids)
    usable = torch.ones(vocabulary, dtype=torch.bool, device=table.device) if candidates is None else candidates.bool()
    if usable.shape not in ((vocabulary,), (batch, vocabulary)) or not usable.any(-1).all():
        raise AttackError(f"candidates must allow a token and be ({vocabulary},) or ({batch}, {vocabulary})")
    usable, free = usable.expand(batch, vocabulary), mask.bool()
    with attacked(model, input_ids, attention_mask, labels, mask):
        tokens = best = input_ids
        best_loss = mean_loss(model, table[input_ids], attention_mask, labels, views)
        for _ in range(flips):
            _, gradient = loss_and_gradient(model, table[tokens], attention_mask, labels, views)
            flipped, losses = tokens, torch.full_like(best_loss, -torch.inf)
            for tried in _most_promising(tokens, gradient, table, free, usable, tries):
                tried_losses = mean_loss(model, table[tried], attention_mask, labels, views)
                flipped, losses = better(flipped, losses, tried, tried_losses)
            free = free & (flipped == tokens)
            tokens = flipped
            best, best_loss = better(best, best_loss, tokens, losses)
        return best


def flip_scores(tokens: Tensor, gradient: Tensor, table: Tensor, free: Tensor, usable: Tensor) -> Tensor:
    """First-order growth of one sample's loss by each flip: ``(e_new - e_old) . gradient``.

    Args:
        tokens: (length,).
        gradient: (length, hidden), of the loss with respect to the embeddings.
        table: (vocabulary, hidden), the embeddings.
        free: (length,), positions that may change.
        usable: (vocabulary,), tokens that may be put in.

    Returns:
        (length, vocabulary); minus infinity where a flip is not allowed or changes nothing.
    """
    scores = gradient.float() @ table.float().T
    scores = scores - scores.gather(1, tokens[:, None])
    scores = scores.masked_fill(~(free[:, None] & usable[None]), -torch.inf)
    return scores.scatter(1, tokens[:, None], -torch.inf)


def _most_promising(
    tokens: Tensor, gradient: Tensor, table: Tensor, free: Tensor, usable: Tensor, count: int
) -> list[Tensor]:
    """The whole batch with its best flip, with its second best, and so on; a sample without one more stays as it is."""
    chosen = [tokens.clone() for _ in range(count)]
    for row, sample in enumerate(tokens):  # one at a time: scores of a whole batch are large
        scores = flip_scores(sample, gradient[row], table, free[row], usable[row]).flatten()
        highest = scores.topk(min(count, len(scores)))
        for place, (score, index) in enumerate(zip(highest.values.tolist(), highest.indices.tolist(), strict=True)):
            if score > -torch.inf:
                chosen[place][row, index // len(table)] = index % len(table)
    return chosen
