"""How a repair trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from optimum_qguard.repair.anchor import DEFAULT_MODULES
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.modules import as_patterns

DTYPES = ("float32", "bfloat16")
_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class Recipe:
    """The settings of one repair.

    AdamW without weight decay, gradients clipped to norm 1, the learning rate constant after a linear warm-up, as in
    the paper on anchor-guided repair.

    Attributes:
        steps: optimizer steps.
        strength, decoupled, modules: see `AnchorCallback`. A decoupled anchor pulls the anchored weights towards its
            own by the share ``learning_rate * strength`` in each step.
        learning_rate, warmup_steps: AdamW's.
        block_size: tokens of a sequence.
        accumulate: sequences of a step.
        dtype: of forward and backward pass; weights and optimizer are float32 in any case.
        seed: of the sequences' order, and of dropout.
        evaluate_every: steps between measurements of the validation text, if there is one.
        patience: training ends after so many measurements without a new best; ``None``: never.
        checkpoint_every: steps between checkpoints to go on from; 0: none.

    Raises:
        RepairError: a setting that makes no sense.
    """

    steps: int = 400
    strength: float = 250.0
    decoupled: bool = True
    modules: tuple[str, ...] = DEFAULT_MODULES
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    block_size: int = 2048
    accumulate: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    evaluate_every: int = 50
    patience: int | None = 3
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", as_patterns(self.modules))
        least = {"steps": 1, "warmup_steps": 0, "block_size": 2, "accumulate": 1, "evaluate_every": 1, "seed": 0}
        for name, bound in {**least, "patience": 1, "checkpoint_every": 0}.items():
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise RepairError(f"{name.replace('_', ' ')} is {value!r}; it is a whole number")
            if value < bound:
                raise RepairError(f"{name.replace('_', ' ')} is {value}; it is at least {bound}")
        if self.seed > _LARGEST_SEED:
            raise RepairError(f"seed is {self.seed}; it is at most {_LARGEST_SEED}")
        for name in ("strength", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise RepairError(f"{name.replace('_', ' ')} is {value!r}; it is a number")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise RepairError(f"strength is {self.strength:g}; it is 0 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RepairError(f"learning rate is {self.learning_rate:g}; it is more than 0")
        if not self.modules:
            raise RepairError("modules names none to hold near the anchor; leave it out for the usual ones")
        if self.dtype not in DTYPES:
            raise RepairError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")

    def check_pull(self) -> None:
        """Raise `RepairError` if a decoupled anchor would be gone beyond in a step."""
        share = self.learning_rate * self.strength
        if self.decoupled and share > 1:
            raise RepairError(
                f"strength {self.strength:g} times the learning rate is {share:g}: more than 1 goes beyond the anchor; "
                "give less of either"
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> Recipe:
        """A recipe of options by name.

        Raises:
            RepairError: there is no such option, or one makes no sense.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise RepairError(f"a repair has no option {name!r}; there are {', '.join(known)}")
        return cls(**options)
