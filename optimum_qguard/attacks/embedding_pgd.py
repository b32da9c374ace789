"""Projected gradient ascent on the input embeddings: small changes to a context that make the right answer unlikely.

No text need have these embeddings, so this is stronger than any attacker who can only write: a bound, not a threat.
The only payload is a wrong answer.

Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks"; Miyato et al. 2017 for
perturbing embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from optimum_qguard.attacks.answer_loss import View, attacked, better, embedding_table, loss_and_gradient, mean_loss
from optimum_qguard.attacks.errors import AttackError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Norm = Literal["linf", "l2"]


def embedding_pgd(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    mask: Tensor,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    random_start: bool = True,
    views: Sequence[View] = (),
    seed: int = 0,
) -> Tensor:
    """Embeddings within ``epsilon`` of the tokens' own, with the largest answer loss seen on the way.

    Lengths are relative to the embeddings' root mean square over the vocabulary: ``linf`` bounds each element of the
    perturbation by ``epsilon`` times that of an element, ``l2`` the perturbation of each position by ``epsilon`` times
    that of a row. Steps follow the gradient's signs (``linf``), or each position's gradient, normalized (``l2``).

    Args:
        model: a causal language model, run in evaluation mode; its weights stay as they are.
        input_ids: (batch, length), right-padded: each sample's prompt and then its answer.
        attention_mask: (batch, length), 0 at padding.
        labels: (batch, length), the answer's tokens at their own positions, -100 elsewhere.
        mask: (batch, length), which positions may change; no answer and no padding.
        epsilon: radius of the ball; at least 0.
        steps: gradient steps.
        step_size: of each, in ``epsilon``'s units; by default ``2.5 * epsilon / steps``.
        norm: of the ball, at each position.
        random_start: begin at a random point of the ball, instead of at its centre.
        views: contexts to average loss and gradients over (an attacker who knows that the model switches between them).
        seed: of the random start.

    Returns:
        (batch, length, hidden), in the embeddings' dtype.

    Raises:
        AttackError: numbers out of range, or tensors that do not fit together (`attacked`).
    """
    if not (math.isfinite(epsilon) and epsilon >= 0) or steps < 1 or not (step_size is None or step_size > 0):
        raise AttackError(
            f"epsilon {epsilon:g}, {steps} steps of {step_size}: epsilon must be at least 0, steps at least 1, and a "
            "step's size more than 0"
        )
    if norm not in ("linf", "l2"):
        raise AttackError(f"norm is {norm!r}; choose linf or l2")
    table = embedding_table(model)
    clean = model.get_input_embeddings()(input_ids).detach()
    unit = float(table.float().square().mean().sqrt()) * (math.sqrt(table.shape[1]) if norm == "l2" else 1.0)
    radius = epsilon * unit
    step = 2.5 * radius / steps if step_size is None else step_size * unit
    allowed = mask.bool()[..., None]
    with attacked(model, input_ids, attention_mask, labels, mask):
        change = torch.zeros_like(clean, dtype=torch.float32)
        best, best_loss = clean, mean_loss(model, clean, attention_mask, labels, views)
        if random_start:
            change = allowed * _random_point(change, radius, norm, seed)
        for _ in range(steps):
            point = (clean + change).to(clean.dtype)
            losses, gradient = loss_and_gradient(model, point, attention_mask, labels, views)
            best, best_loss = better(best, best_loss, point, losses)
            change = allowed * project(change + step * direction(gradient.float(), norm), radius, norm)
        point = (clean + change).to(clean.dtype)
        return better(best, best_loss, point, mean_loss(model, point, attention_mask, labels, views))[0]


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The steepest ascent of length 1 at each position; 0 where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny)


def project(change: Tensor, radius: float, norm: Norm) -> Tensor:
    """The nearest point of the ball at each position (the last dimension is a position's)."""
    if norm == "linf":
        return change.clamp(-radius, radius)
    length: Tensor = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    shrink: Tensor = (radius / length.clamp(min=torch.finfo(change.dtype).tiny)).clamp(max=1.0)
    return change * shrink


def _random_point(like: Tensor, radius: float, norm: Norm, seed: int) -> Tensor:
    """Uniform in the cube; for ``l2`` of uniform direction and length."""
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        return radius * (2 * torch.rand(like.shape, generator=generator) - 1).to(like)
    lengths = torch.rand(like.shape[:-1], generator=generator)[..., None]
    return radius * (lengths * direction(torch.randn(like.shape, generator=generator), norm)).to(like)
