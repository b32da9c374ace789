"""Evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off; afterwards the model is in the mode that it came in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
