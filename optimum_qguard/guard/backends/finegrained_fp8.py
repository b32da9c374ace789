"""transformers' own fine-grained FP8 (E4M3 in tiles)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config

from optimum_qguard.formats import Format
from optimum_qguard.formats.float8 import Float8
from optimum_qguard.guard.backends.backend import Backend
from optimum_qguard.guard.errors import QGuardConfigError


class FineGrainedFP8(Backend):
    quant_methods = ("fp8",)
    presets = {"fp8": FineGrainedFP8Config}
    requirement = ("transformers", None)

    def check(self, config: Any) -> None:
        if config.dequantize:
            raise QGuardConfigError("FineGrainedFP8Config(dequantize=True) quantizes nothing; nothing to guard")

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        tile = config.weight_block_size
        return Float8(
            torch.float8_e4m3fn, (tile[0], tile[1]) if tile else "matrix", "transformers", config.scale_fmt == "ue8m0"
        )


backend = FineGrainedFP8()
