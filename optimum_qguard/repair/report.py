"""What a repair did: ``repair.json`` beside the weights, and the model card's section."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from optimum_qguard import __version__
from optimum_qguard.checkpoint import atomic_write, merge_card
from optimum_qguard.checkpoint.description import REPAIR_FILE
from optimum_qguard.repair.recipe import Recipe

TAGS = ("repaired", "qguard")


class Loss(BaseModel):
    """The training loss (nats per token) around one step.

    Attributes:
        step: the mean is over the steps since the entry before, up to this one.
        anchor_distance: of the weights after this step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    loss: float
    anchor_distance: float | None = None


class Validation(BaseModel):
    """The perplexity of the validation text, in blocks, after so many steps; ``None`` where it is beyond 1e308."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    perplexity: float | None


def perplexity_of(loss: float) -> float | None:
    """``exp(loss)``, if floating-point numbers go so far."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


class RepairReport(BaseModel):
    """Everything needed to audit or repeat one repair.

    Attributes:
        schema_version: of this file's layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: what was repaired, as it was named, and ``revision``, the Hub's commit if there was one.
        anchor: likewise what it was held near to, ``None`` for nothing; and ``anchor_revision``.
        recipe: how it was trained.
        steps_done: steps after which the weights are the ones that were written.
        steps_trained: steps that were trained, which are fewer than the recipe's where the validation text ended it.
        losses: of the training text, on the way.
        validation: of the validation text, on the way, from before the first step on.
        anchor_distance_before, anchor_distance_after: Euclidean distance of the anchored weights from the anchor's, of
            the input and of what was written, before it is rounded to the input's dtype.
        seconds: training and measuring took; of a run that was resumed, the last part.
        versions: of the libraries that trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    package_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    model: str
    revision: str | None
    anchor: str | None
    anchor_revision: str | None
    recipe: Recipe
    steps_done: int
    steps_trained: int
    losses: tuple[Loss, ...]
    validation: tuple[Validation, ...]
    anchor_distance_before: float | None
    anchor_distance_after: float | None
    seconds: float
    versions: dict[str, str]

    @property
    def loss_before(self) -> float:
        """Of the first step's blocks, before it."""
        return self.losses[0].loss

    @property
    def loss_after(self) -> float:
        """Mean over the last steps that were logged before the weights were written."""
        return [each.loss for each in self.losses if each.step <= self.steps_done][-1]

    @property
    def perplexity_before(self) -> float | None:
        """Of the validation text, before the first step; ``None`` without one, and beyond 1e308."""
        return self.validation[0].perplexity if self.validation else None

    @property
    def perplexity_after(self) -> float | None:
        """Of the validation text, with the weights that were written; ``None`` likewise."""
        measured = {each.step: each.perplexity for each in self.validation}
        return measured.get(self.steps_done)

    def __str__(self) -> str:
        parts = [
            f"{self.steps_done} steps of {self.recipe.accumulate * self.recipe.block_size:,} tokens: training loss "
            f"{self.loss_before:.4f} → {self.loss_after:.4f}"
        ]
        if self.perplexity_before is not None and self.perplexity_after is not None:
            parts.append(f"validation perplexity {self.perplexity_before:.2f} → {self.perplexity_after:.2f}")
        if self.anchor_distance_before is not None:
            parts.append(f"distance to the anchor {self.anchor_distance_before:.4g} → {self.anchor_distance_after:.4g}")
        return "; ".join(parts)

    __repr__ = __str__

    def write(self, folder: Path) -> None:
        """Write ``repair.json`` and the model card's section into the folder of a checkpoint.

        An existing model card keeps everything it has.
        """
        merge_card(folder, section_id="repair", markdown=self._card_section(), tags=TAGS)
        atomic_write(folder / REPAIR_FILE, self.model_dump_json(indent=2) + "\n")

    def _card_section(self) -> str:
        held = ""
        if self.anchor is not None:
            # The path of a folder is nobody's business.
            near = "a reference checkpoint" if self.anchor_revision is None else f"`{self.anchor}`"
            way = "decoupled from the gradient" if self.recipe.decoupled else "as a penalty in the loss"
            held = f", the weights held near those of {near} (strength {self.recipe.strength:g}, {way})"
        return (
            "## Repaired\n\n"
            f"This checkpoint was fine-tuned by optimum-qguard {self.package_version} to repair damaged "
            f"weights{held}. {self}. Details: `{REPAIR_FILE}`.\n"
        )
