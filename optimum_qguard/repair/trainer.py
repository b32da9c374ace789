"""A ``Trainer`` with an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from optimum_qguard.repair.anchor import DEFAULT_MODULES, AnchorCallback


class AnchorTrainer(Trainer):  # type: ignore[misc]
    """A transformers ``Trainer`` that holds the weights near an anchor's, and tells its trackers how near they are.

    Args:
        arguments: those of ``Trainer``.
        anchor, anchor_strength, anchor_decoupled, anchor_modules: see `AnchorCallback`.

    Raises:
        RepairError: see `AnchorCallback`.
    """

    def __init__(
        self,
        *arguments: Any,
        anchor: str | Path,
        anchor_strength: float,
        anchor_decoupled: bool = False,
        anchor_modules: Sequence[str] = DEFAULT_MODULES,
        **options: Any,
    ) -> None:
        callback = AnchorCallback(anchor, strength=anchor_strength, decoupled=anchor_decoupled, modules=anchor_modules)
        super().__init__(*arguments, **options)
        self.callback_handler.callbacks.insert(0, callback)  # before the trackers, which then see what it logs
