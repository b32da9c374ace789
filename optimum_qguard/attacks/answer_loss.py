"""What attacks on the input climb: the right answer's loss, and its gradient with respect to the input embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_qguard.attacks.errors import AttackError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100

# A context in which the model is one of several, such as one that sets its width: ``lambda: bits(model, 4)``.
View = Callable[[], contextlib.AbstractContextManager[object]]


def answer_loss(model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each sample's labels, in nats.

    Args:
        model: a causal language model.
        embeddings: (batch, length, hidden), of right-padded samples.
        attention_mask: (batch, length), 0 at padding.
        labels: (batch, length), the tokens of the answer at their own positions and ``IGNORED`` elsewhere.

    Returns:
        (batch,), float32.
    """
    first = int((labels != IGNORED).any(0).nonzero()[0])
    output: Any = model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False)
    logits, wanted = output.logits[:, first - 1 : -1], labels[:, first:]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1) / (wanted != IGNORED).sum(1)


def loss_and_gradient(
    model: PreTrainedModel,
    embeddings: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    views: Sequence[View] = (),
) -> tuple[Tensor, Tensor]:
    """`answer_loss` and its gradient, both averaged over the views: expectation over transformation.

    Args:
        model, embeddings, attention_mask, labels: as for `answer_loss`.
        views: the contexts; none means the model as it is.

    Returns:
        Losses (batch,), and for each sample the gradient of its own, (batch, length, hidden) in the embeddings' dtype.

    Source: Athalye et al. 2018, "Synthesizing robust adversarial examples", for the average.
    """
    contexts = views or (contextlib.nullcontext,)
    losses = torch.zeros(len(embeddings), device=embeddings.device)
    gradient = torch.zeros_like(embeddings)
    for view in contexts:
        with view(), torch.enable_grad():
            leaf = embeddings.detach().requires_grad_()
            loss = answer_loss(model, leaf, attention_mask, labels)
            gradient += torch.autograd.grad(loss.sum(), leaf)[0] / len(contexts)
        losses += loss.detach() / len(contexts)
    return losses, gradient


def mean_loss(
    model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor, labels: Tensor, views: Sequence[View] = ()
) -> Tensor:
    """The losses of `loss_and_gradient` alone."""
    contexts = views or (contextlib.nullcontext,)
    losses = torch.zeros(len(embeddings), device=embeddings.device)
    for view in contexts:
        with view(), torch.no_grad():
            losses += answer_loss(model, embeddings, attention_mask, labels) / len(contexts)
    return losses


def better(best: Tensor, best_loss: Tensor, other: Tensor, other_loss: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample (the first dimension) the one of higher loss, and that loss."""
    higher = other_loss > best_loss
    chosen = higher.view(-1, *[1] * (other.dim() - 1))
    return torch.where(chosen, other, best), torch.where(higher, other_loss, best_loss)


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The embedding of every token as the model's first layer gets it, (vocabulary, hidden)."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        table: Tensor = embed(torch.arange(embed.num_embeddings, device=embed.weight.device))
    return table


@contextlib.contextmanager
def attacked(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, mask: Tensor
) -> Iterator[None]:
    """Dropout off meanwhile.

    Raises:
        AttackError: shapes that differ, padding that is not on the right, a sample without an answer or without
            positions that may change, a first token that is an answer's, or answers and padding that may change.
    """
    shapes = {tuple(each.shape) for each in (input_ids, attention_mask, labels, mask)}
    if len(shapes) > 1 or input_ids.dim() != 2:
        raise AttackError(
            f"input_ids, attention_mask, labels and mask must all be (batch, length), got shapes {sorted(shapes)}"
        )
    real, answers = attention_mask.bool(), labels != IGNORED
    if not (real[:, :-1] | ~real[:, 1:]).all() or not real[:, 0].all():
        raise AttackError("attention_mask has padding before tokens; pad on the right")
    if not answers.any(1).all() or answers[:, 0].any():
        raise AttackError("each sample needs labels other than -100, and none at its first position")
    if not mask.any(1).all() or (mask.bool() & (answers | ~real)).any():
        raise AttackError("mask must let some position of each sample change, and none of an answer or of padding")
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
