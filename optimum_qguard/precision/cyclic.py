"""Cyclic precision training (Fu et al., ICLR 2021): the forward pass's width goes up and down while a model trains.

trainer = Trainer(model, …, callbacks=[CyclicPrecisionCallback(minimum=3, maximum=8, cycles=8)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optimum_qguard.precision.adapters import WidthAdapters
from optimum_qguard.precision.bitmap import check_bits
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.fake_quantization import FakeQuantization

Schedule = Literal["cosine", "linear", "triangular", "constant"]


def scheduled_bits(
    step: int, steps: int, *, minimum: int, maximum: int, cycles: int, schedule: Schedule = "cosine"
) -> int:
    """``B(t) = round(B_min + (B_max − B_min)·f(φ))`` with ``φ = (t mod T/N) / (T/N)``, half to even.

    ``f`` is ``½(1 − cos πφ)`` for ``"cosine"``, ``φ`` for ``"linear"``, ``1 − |2φ − 1|`` for ``"triangular"`` (up and
    down in one cycle), and 1 for ``"constant"``.

    Args:
        step: ``t``, 0 to ``steps − 1``.
        steps: ``T``, all optimizer steps.
        minimum, maximum: ``B_min`` and ``B_max``, 2 to 8.
        cycles: ``N``, 1 to ``steps``.
        schedule: ``f``.

    Raises:
        PrecisionError: any of them out of range, or an unknown schedule.
    """
    check_schedule(minimum, maximum, cycles, schedule)
    if not cycles <= steps or not 0 <= step < steps:
        raise PrecisionError(f"{cycles} cycles, step {step} of {steps}: a cycle needs a step or more; train for longer")
    phase = step * cycles % steps / steps
    share = {
        "cosine": (1 - math.cos(math.pi * phase)) / 2,
        "linear": phase,
        "triangular": 1 - abs(2 * phase - 1),
        "constant": 1.0,
    }[schedule]
    return round(minimum + (maximum - minimum) * share)


def check_schedule(minimum: int, maximum: int, cycles: int, schedule: str) -> None:
    """Raise `PrecisionError` unless these are widths in order, at least one cycle, and a `Schedule`."""
    check_bits(minimum, "the minimum")
    check_bits(maximum, "the maximum")
    if minimum > maximum:
        raise PrecisionError(f"a minimum of {minimum} bits and a maximum of {maximum}: the minimum is the smaller one")
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise PrecisionError(f"{cycles!r} cycles: needs a whole number, at least one")
    if schedule not in get_args(Schedule):
        raise PrecisionError(f"there is no schedule {schedule!r}; there are {', '.join(get_args(Schedule))}")


class CyclicPrecisionCallback(TrainerCallback):  # type: ignore[misc]
    """Trains at the widths of `scheduled_bits`, one for all passes of an optimizer step.

    While it trains, the model computes as `FakeQuantization` says: weights rounded to B(t) bits forward, gradients of
    the layers' outputs to ``backward_bits`` backward, straight through the rounding of weights. Between steps, where
    the Trainer evaluates and saves, it computes with ``evaluation_bits``. When training ends, the model is plain again;
    after an error in it call `remove`.

    What the Trainer logs has a field ``bits``: the width of the step before.

    Args:
        minimum, maximum, cycles, schedule: see `scheduled_bits`. A minimum equal to the maximum is a static width.
        backward_bits, modules, group_size, symmetric: see `FakeQuantization`.
        evaluation_bits: 2 to 8; ``None`` is full precision.
        adapters: a LoRA adapter for each width, of which the one of the current width is switched on.

    Raises:
        PrecisionError: see `scheduled_bits` and `FakeQuantization`, some of it not before training begins; a width
            without an adapter.
    """

    def __init__(
        self,
        minimum: int = 3,
        maximum: int = 8,
        cycles: int = 8,
        schedule: Schedule = "cosine",
        backward_bits: int | None = 8,
        modules: Sequence[str] | None = None,
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        evaluation_bits: int | None = None,
        adapters: WidthAdapters | None = None,
    ) -> None:
        check_schedule(minimum, maximum, cycles, schedule)
        check_bits(backward_bits, "the backward pass", or_none=True)
        check_bits(evaluation_bits, "evaluation", or_none=True)
        self._schedule: dict[str, Any] = {
            "minimum": minimum,
            "maximum": maximum,
            "cycles": cycles,
            "schedule": schedule,
        }
        self._options: dict[str, Any] = {
            "modules": modules,
            "group_size": group_size,
            "symmetric": symmetric,
            "backward_bits": backward_bits,
        }
        self._evaluation_bits = evaluation_bits
        self._adapters = adapters
        self._layers: FakeQuantization | None = None
        self._last: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.remove()
        widths = {scheduled_bits(step, state.max_steps, **self._schedule) for step in range(state.max_steps)}
        if self._adapters is not None:
            self._adapters.require(widths if self._evaluation_bits is None else {*widths, self._evaluation_bits})
        self._layers = FakeQuantization(model, **self._options)
        self._switch(self._evaluation_bits)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = scheduled_bits(state.global_step, state.max_steps, **self._schedule)
        self._switch(self._last)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._switch(self._evaluation_bits)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._layers is not None and self._last is not None:
            # What was logged is in the history before callbacks see it.
            for record in (logs, state.log_history[-1]):
                if record is not None:
                    record["bits"] = self._last

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Make the model plain again. Can be called at any time, and again."""
        if self._layers is not None:
            self._layers.remove()
        self._layers = None
        self._last = None

    def _switch(self, bits: int | None) -> None:
        assert self._layers is not None
        self._layers.bits = bits
        if self._adapters is not None and bits is not None:
            self._adapters.switch(bits)
