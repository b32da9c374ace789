"""bitsandbytes: LLM.int8(), NF4 and FP4."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from optimum_qguard.formats import Format
from optimum_qguard.formats.codebook4bit import Codebook4Bit
from optimum_qguard.formats.int8_rowwise import Int8Rowwise
from optimum_qguard.guard.backends.backend import Backend
from optimum_qguard.guard.errors import QGuardConfigError


class BitsAndBytes(Backend):
    quant_methods = ("bitsandbytes",)
    presets = {
        "bnb-int8": partial(BitsAndBytesConfig, load_in_8bit=True),
        "bnb-nf4": partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bnb-fp4": partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    }
    requirement = ("bitsandbytes", None)

    def check(self, config: Any) -> None:
        if not (config.load_in_8bit or config.load_in_4bit):
            raise QGuardConfigError("BitsAndBytesConfig quantizes nothing; give load_in_8bit=True or load_in_4bit=True")
        if config.load_in_8bit and config.llm_int8_has_fp16_weight:
            raise QGuardConfigError("llm_int8_has_fp16_weight=True keeps full-precision weights; nothing to guard")

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        if config.load_in_8bit:
            return Int8Rowwise()
        block_size = getattr(module.weight, "blocksize", 64)
        return Codebook4Bit(config.bnb_4bit_quant_type, block_size, config.bnb_4bit_use_double_quant)

    def is_transposed(self, module: nn.Module) -> bool:
        return issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)

    def handover_dtype(self, config: Any, weight: Tensor) -> torch.dtype:
        # int8: bitsandbytes casts to float16 before anything else, so guard need not round twice.
        return torch.float16 if config.load_in_8bit else weight.dtype


backend = BitsAndBytes()
