"""Libraries that quantize on load but need hardware on which we could not compare symbols with theirs.

Their cells are estimated by a format of the same family: good enough for the amplitude of Gaussian noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimum_qguard.formats import Format, get_format
from optimum_qguard.formats.float8 import Float8
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.formats.int8_rowwise import Int8Rowwise
from optimum_qguard.guard.backends.backend import Backend
from optimum_qguard.guard.errors import QGuardConfigError


class Estimated(Backend):
    quant_methods = ("eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "metal", "mxfp4", "nvfp4", "sinq")
    requirement = ("transformers", None)
    exact = False

    def check(self, config: Any) -> None:
        if getattr(config, "dequantize", False):
            raise QGuardConfigError(f"{type(config).__name__}(dequantize=True) quantizes nothing; nothing to guard")

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        method = str(getattr(config.quant_method, "value", config.quant_method))
        if method == "eetq":
            return Int8Rowwise()
        if method == "fbgemm_fp8":
            return Float8(torch.float8_e4m3fn, "row", "float32")
        if method == "metal":
            return GPTQ(config.bits, config.group_size, symmetric=False)
        if method == "sinq":
            return GPTQ(config.nbits, config.group_size, symmetric=False)
        if method == "mxfp4" or (method == "fp_quant" and config.forward_dtype == "mxfp4"):
            return get_format("mxfp4")
        return get_format("nvfp4")


backend = Estimated()
