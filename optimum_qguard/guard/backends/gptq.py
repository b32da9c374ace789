"""GPTQ through gptqmodel (transformers calls it by way of optimum)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GPTQConfig
from transformers.pytorch_utils import Conv1D

from optimum_qguard.formats import Format
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.guard.backends.backend import Backend


class GPTQModel(Backend):
    quant_methods = ("gptq",)
    presets = {f"gptq-{bits}": partial(GPTQConfig, bits=bits) for bits in (2, 3, 4, 8)}
    requirement = ("gptqmodel", "gptq")
    calibrates = True

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        return _format(config)

    def keeps_symbols(self, config: Any) -> bool:
        return _format(config).keeps_symbols(torch.float32)

    def is_transposed(self, module: nn.Module) -> bool:
        return isinstance(module, Conv1D)

    def modules_to_calibrate(self, config: Any, quantizer: Any, model: nn.Module) -> dict[str, nn.Module]:
        from optimum.gptq.utils import get_block_name_with_pattern, get_layers

        optimum = quantizer.optimum_quantizer
        blocks = optimum.block_name_to_quantize or get_block_name_with_pattern(model)
        chosen = optimum.modules_in_block_to_quantize
        names = None if chosen is None else {name for group in chosen for name in group}
        return {
            f"{blocks}.{index}.{name}": layer
            for index, block in enumerate(model.get_submodule(blocks).children())
            for name, layer in get_layers(block).items()
            if names is None or name in names
        }

    def calibrated_modules(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if hasattr(module, "qweight")]

    def forget_samples(self, quantizer: Any, model: nn.Module) -> None:
        # The name of a public data set may be known; texts are the user's, and tensors could not be written at all.
        config: Any = model.config
        for holder in (config.quantization_config, quantizer.optimum_quantizer):
            if not isinstance(holder.dataset, str):
                holder.dataset = None


def _format(config: Any) -> GPTQ:
    return GPTQ(config.bits, config.group_size, config.sym, bool(config.desc_act))


backend = GPTQModel()
