"""Training at several widths in one step, so that one set of weights serves all of them.

trainer = JointPrecisionTrainer(model, …, widths=(8, 6, 4), consistency=1.0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from optimum_qguard.precision.adapters import WidthAdapters
from optimum_qguard.precision.bitmap import check_bits
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.fake_quantization import FakeQuantization


def joint_loss(
    model: Any,
    batch: Mapping[str, Tensor],
    widths: Sequence[int],
    *,
    layers: FakeQuantization,
    consistency: float = 0.0,
    adapters: WidthAdapters | None = None,
) -> Tensor:
    """``Σ_b L_b + λ·Σ_{b<B} KL(p_B ‖ p_b)``: the loss at each width, and how far lower widths are from the highest.

    ``p_B`` is detached: lower widths learn from the highest and not the other way. KL is the mean over the tokens that
    are predicted (their label is not −100).

    Args:
        model: a causal language model.
        batch: its inputs, ``labels`` among them, ``(batch, tokens)``.
        widths: 2 to 8, at least two different ones.
        layers: of this model; their width is as before afterwards.
        consistency: ``λ``, 0 or more.
        adapters: of this model; switched with the width.

    Raises:
        PrecisionError: see above; no labels; the model recomputes activations in the backward pass (gradient
            checkpointing), where the widths of the forward pass are over; a width without an adapter.
    """
    _check(widths, consistency, adapters)

    def run() -> tuple[Tensor, Any]:
        outputs = model(**batch)
        return outputs.loss, outputs

    labels = _predicted(batch)
    return _joint(model, run, labels, (labels != -100).sum(), widths, layers, consistency, adapters)


class JointPrecisionTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose loss in training is `joint_loss`; it evaluates and saves at full precision.

    Args:
        widths, consistency, adapters: see `joint_loss`.
        modules, group_size, symmetric, backward_bits: see `FakeQuantization`.
        args, kwargs: the Trainer's.

    Raises:
        PrecisionError: see `joint_loss` and `FakeQuantization`, some of it not before training begins.
    """

    def __init__(
        self,
        *args: Any,
        widths: Sequence[int] = (8, 6, 4),
        consistency: float = 0.0,
        adapters: WidthAdapters | None = None,
        modules: Sequence[str] | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
        backward_bits: int | None = 8,
        **kwargs: Any,
    ) -> None:
        _check(widths, consistency, adapters)
        super().__init__(*args, **kwargs)
        self._widths = tuple(widths)
        self._consistency = consistency
        self._adapters = adapters
        self._options: dict[str, Any] = {
            "modules": modules,
            "group_size": group_size,
            "symmetric": symmetric,
            "backward_bits": backward_bits,
        }
        self._layers: FakeQuantization | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._layers = FakeQuantization(self.model, **self._options)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._layers.remove()
            self._layers = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._layers is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = _predicted(inputs)
        n_tokens = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        last: Any = None

        def run() -> tuple[Tensor, Any]:
            nonlocal last
            loss, last = super(JointPrecisionTrainer, self).compute_loss(model, dict(inputs), True, num_items_in_batch)
            return loss, last

        loss = _joint(model, run, labels, n_tokens, self._widths, self._layers, self._consistency, self._adapters)
        return (loss, last) if return_outputs else loss


def _joint(
    model: Any,
    run: Callable[[], tuple[Tensor, Any]],
    labels: Tensor,
    n_tokens: Any,
    widths: Sequence[int],
    layers: FakeQuantization,
    consistency: float,
    adapters: WidthAdapters | None,
) -> Tensor:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise PrecisionError(
            "gradient checkpointing computes again in the backward pass, when the widths of the forward pass are over; "
            "train jointly without it"
        )
    terms = []
    reference: Tensor | None = None
    for bits in sorted(set(widths), reverse=True):
        with layers.at(bits):
            if adapters is not None:
                adapters.switch(bits)
            loss, outputs = run()
        terms.append(loss)
        if consistency:
            predictions = functional.log_softmax(outputs.logits[:, :-1][labels != -100].float(), -1)
            if reference is None:
                reference = predictions.detach()
            else:
                divergence = functional.kl_div(predictions, reference, reduction="sum", log_target=True)
                terms.append(consistency * divergence / n_tokens)
    return torch.stack(terms).sum()


def _predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels that a causal model has predictions for, ``(batch, tokens - 1)``."""
    if "labels" not in batch:
        raise PrecisionError(
            f"a batch has {', '.join(batch)} and no labels; joint training needs them (input_ids, -100 where nothing "
            "is to be learned), from the data set or its collator"
        )
    return batch["labels"][:, 1:]


def _check(widths: Sequence[int], consistency: float, adapters: WidthAdapters | None) -> None:
    for bits in widths:
        check_bits(bits, "joint training")
    if len(set(widths)) < 2:
        raise PrecisionError(f"joint training at {list(widths)} bits: needs two different widths, or a static width")
    if not consistency >= 0:
        raise PrecisionError(f"a consistency of {consistency:g}: needs 0 or more")
    if adapters is not None:
        adapters.require(widths)
