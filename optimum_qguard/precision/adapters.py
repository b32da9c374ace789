"""A LoRA adapter (peft) for each width, so that widths need not agree on what they learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from optimum_qguard.precision.bitmap import check_bits
from optimum_qguard.precision.errors import PrecisionError


class WidthAdapters:
    """Adapters called ``bits3``, ``bits4`` … on one model, of which one is on at a time.

    All of them can be trained at any time: what the adapter that is off gets is no gradient, so that an optimizer
    leaves it and its own state alone.

    Attributes:
        model: the peft model, with the original's weights frozen.
        widths: from the lowest to the highest.

    Args:
        model: a transformers model without adapters.
        widths: 2 to 8, at least one.
        config: a ``peft.LoraConfig``, the same for all.

    Raises:
        ImportError: peft is not installed.
        PrecisionError: a width out of range or none.
    """

    def __init__(self, model: Any, widths: Sequence[int], config: Any) -> None:
        for bits in widths:
            check_bits(bits, "an adapter")
        if not widths:
            raise PrecisionError("no widths: adapters need at least one")
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise ImportError("adapters need peft; run: pip install 'optimum-qguard[adapters]'", name="peft") from error
        self.widths = tuple(sorted(set(widths)))
        self.model: Any = get_peft_model(model, config, adapter_name=adapter_name(self.widths[0]))
        for bits in self.widths[1:]:
            self.model.add_adapter(adapter_name(bits), config)
        self._trained = [
            parameter
            for name, parameter in self.model.named_parameters()
            if any(f".{adapter_name(bits)}." in f"{name}." for bits in self.widths)
        ]
        self.switch(self.widths[-1])

    def switch(self, bits: int) -> None:
        """Turn the adapter of a width on, and the others off.

        Raises:
            PrecisionError: the width has none.
        """
        self.require([bits])
        self.model.set_adapter(adapter_name(bits))
        # peft freezes what it turns off, and an optimizer takes only what is not frozen when it is made.
        for parameter in self._trained:
            parameter.requires_grad_()

    def require(self, widths: Iterable[int]) -> None:
        """Raise `PrecisionError` if one of the widths has no adapter."""
        missing = sorted(set(widths) - set(self.widths))
        if missing:
            raise PrecisionError(
                f"no adapter for {', '.join(map(str, missing))} bits; there are adapters for "
                f"{', '.join(map(str, self.widths))}"
            )


def adapter_name(bits: int) -> str:
    """What the adapter of a width is called."""
    return f"bits{bits}"
