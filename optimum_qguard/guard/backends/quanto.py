"""optimum-quanto: int8, int4, int2 and float8 weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import QuantoConfig

from optimum_qguard.formats import Format, get_format
from optimum_qguard.guard.backends.backend import Backend


class Quanto(Backend):
    quant_methods = ("quanto",)
    presets = {
        f"quanto-{weights}": partial(QuantoConfig, weights=weights) for weights in ("int8", "int4", "int2", "float8")
    }
    requirement = ("optimum.quanto", "quanto")

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        return get_format(f"quanto-{config.weights}")


backend = Quanto()
