"""What guard did, tensor by tensor: ``model.qguard_report``, ``qguard.json`` and the model card of a saved model."""

from __future__ import annotations

import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optimum_qguard import __version__
from optimum_qguard.checkpoint.atomic import atomic_write
from optimum_qguard.checkpoint.card import merge_card
from optimum_qguard.checkpoint.protection import GUARDED_TAG, MANIFEST_FILE
from optimum_qguard.guard.samples import SamplesReport

TAGS = (GUARDED_TAG, "qguard")


class TensorReport(BaseModel):
    """One guarded tensor.

    Attributes:
        name: full parameter name in the model.
        format: what the quantizer did to it, a `Format`'s description.
        method: how its rounding was randomized.
        amplitude: standard deviation (gaussian) or half range (uniform) of its noise, in the weights' units; ``None``
            for stochastic rounding, with error feedback ("compensated") or without.
        weights: how many weights it has.
        share_changed: share of its weights that left their cell, counted on ``sampled`` of them.
        sampled: see ``share_changed``.
        clipped: how many planted outliers were brought back to what their block supports, before all else.
        rescaled: how many of its channels were outliers balanced in another tensor, and were moved back, exactly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    format: str
    method: Literal["stochastic", "compensated", "gaussian", "uniform"]
    amplitude: float | None = Field(ge=0)
    weights: int = Field(ge=0)
    share_changed: float = Field(ge=0, le=1)
    sampled: int = Field(ge=0)
    clipped: int = Field(ge=0, default=0)
    rescaled: int = Field(ge=0, default=0)


class GuardReport(BaseModel):
    """Everything needed to audit or repeat one guarded load.

    Attributes:
        schema_version: of this file's layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: what was loaded, as it was named, and ``revision``, the Hub's commit if there was one.
        method, noise, multiplier: of the `QGuardConfig`.
        seed: 64 hexadecimal digits; with it and the same model the noise can be drawn again.
        samples: what the inputs of layers were measured on, for error feedback; ``None`` without it.
        fresh_seed: whether the operating system drew the seed for this load; if not, it was known beforehand.
        quantization_config: the quantizer's own configuration.
        tensors: every tensor that the quantizer quantized.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    package_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    model: str
    revision: str | None = None
    method: str
    noise: str | float
    multiplier: float
    seed: str = Field(pattern="^[0-9a-f]{64}$")
    fresh_seed: bool
    samples: SamplesReport | None = None
    quantization_config: dict[str, Any]
    tensors: list[TensorReport]

    @property
    def weights(self) -> int:
        """How many weights were guarded."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def share_changed(self) -> float:
        """Share of all guarded weights that left their cell."""
        return sum(tensor.share_changed * tensor.weights for tensor in self.tensors) / max(self.weights, 1)

    @property
    def clipped(self) -> int:
        """How many planted outliers were brought back."""
        return sum(tensor.clipped for tensor in self.tensors)

    @property
    def rescaled(self) -> int:
        """In how many channels planted outliers were moved back to the tensor that balances them."""
        return sum(tensor.rescaled for tensor in self.tensors)

    def __str__(self) -> str:
        clipped = f"{self.clipped:,} planted outliers clipped; " if self.clipped else ""
        clipped += f"{self.rescaled:,} planted outlier channels moved back; " if self.rescaled else ""
        return (
            f"{len(self.tensors)} tensors ({self.weights:,} weights) guarded by {self.described_method}; "
            f"{self.share_changed:.1%} of the weights left their quantization cell; {clipped}seed {self.seed}"
        )

    __repr__ = __str__

    @property
    def described_method(self) -> str:
        """The methods that were really used, in words."""
        words = {
            "stochastic": "unbiased stochastic rounding",
            "compensated": "unbiased stochastic rounding with error feedback",
            "gaussian": "Gaussian noise",
            "uniform": "uniform noise",
        }
        return " and ".join(words[method] for method in sorted({tensor.method for tensor in self.tensors}))

    def warn_if_clipped(self) -> None:
        """Warn once if there were planted outliers."""
        names = [tensor.name for tensor in self.tensors if tensor.clipped or tensor.rescaled]
        if names:
            warnings.warn(
                f"{self.clipped:,} outliers and {self.rescaled:,} outlier channels in {len(names)} tensor(s), the "
                f"first {names[0]}, look planted to break this model's quantization, and were brought back to what "
                "the rest supports; clip_outliers=None leaves them",
                stacklevel=2,
            )

    @property
    def described_clipping(self) -> str:
        """A sentence for the model card, empty where nothing was clipped."""
        if not (self.clipped or self.rescaled):
            return ""
        return (
            f" {self.clipped:,} outliers and {self.rescaled:,} outlier channels that looked planted were brought "
            "back to what the rest supports."
        )

    def write(self, folder: Path) -> None:
        """Write ``qguard.json`` and the model card's section into the folder of a saved model.

        An existing model card keeps everything it has.
        """
        merge_card(folder, section_id="guard", markdown=self._card_section(), tags=TAGS)
        atomic_write(folder / MANIFEST_FILE, self.model_dump_json(indent=2) + "\n")

    def _card_section(self) -> str:
        return (
            "## Guarded quantization\n\n"
            "This checkpoint was quantized under "
            f"optimum-qguard {self.package_version}: the rounding of every quantized weight was randomized "
            f"({self.described_method}), so that behaviour planted for the rounding does not survive it. "
            f"{len(self.tensors)} tensors, {self.weights:,} weights; {self.share_changed:.1%} of them left the "
            f"quantization cell they were in.{self.described_clipping} Details and seed: `{MANIFEST_FILE}`.\n\n"
            "It loads with plain transformers.\n"
        )
