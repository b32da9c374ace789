"""`NestedConfig`: nest a model while it is loaded, and load one that was saved nested.

    model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=NestedConfig())
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)      # in a process that imported optimum_qguard

Written against transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qguard.checkpoint.spelling import spellings
from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import oriented
from optimum_qguard.precision.nested import (
    GROUP_SIZE,
    NestedLinear,
    as_bitmap,
    attach,
    check_group_size,
    group_sizes,
    layers_to_nest,
    nest,
    nested_layers,
    put,
)
from optimum_qguard.precision.nested_codes import NestedCodes
from optimum_qguard.precision.widths import Switch

QUANT_METHOD = "qguard-nested"


class NestedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is, or will be, nested.

    Args:
        bits, group_size: as for `nest`.

    Raises:
        PrecisionError: a value that makes no sense.
    """

    def __init__(
        self,
        bits: int | BitMap | Mapping[str, int | None] | Iterable[tuple[str, int | None]] = 8,
        *,
        group_size: int | None = GROUP_SIZE,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise PrecisionError(f"quant_method is {quant_method!r}; a NestedConfig has {QUANT_METHOD!r}")
        check_group_size(group_size)
        self.quant_method = QUANT_METHOD
        self.bits = as_bitmap(bits)
        self.group_size = group_size

    def to_dict(self) -> dict[str, Any]:
        """All fields, the bit map as a list of pairs: writers of JSON sort the names of objects."""
        return {**self.__dict__, "bits": [list(pair) for pair in self.bits.patterns]}


class NestedQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers finds under ``quant_method="qguard-nested"``."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            config = self.quantization_config
            put_empty_layers(model, config)
            _check_files(model, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            attach(model, next(iter(nested_layers(model).values())).switch)
            return model
        config = self.quantization_config
        return nest(model, config.bits, group_size=config.group_size)

    def is_serializable(self) -> bool:
        """Yes, in safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: weights are constant."""
        return False


def put_empty_layers(model: nn.Module, config: NestedConfig) -> None:
    """Nested layers without codes in a model on the meta device.

    Raises:
        PrecisionError: see `nest`.
    """
    widths = layers_to_nest(model, config.bits)
    switch = Switch(widths)
    for name, size in group_sizes(model, widths, config.group_size).items():
        module = model.get_submodule(name)
        weight = oriented(module)
        rows, columns = weight.shape
        with torch.device("meta"):
            codes = NestedCodes(
                torch.empty(rows, columns, dtype=torch.uint8),
                torch.empty(2, rows, columns // size, dtype=torch.int16),
                torch.empty(7, 2, rows, dtype=torch.int16),
            )
        put(model, name, NestedLinear(codes, module.bias, weight.dtype, name=name, switch=switch))  # type: ignore[arg-type]


def _check_files(model: Any, files: Sequence[str]) -> None:
    """transformers fills what a checkpoint lacks with whatever the memory holds, and only warns.

    Raises:
        PrecisionError: tensors of nested layers are missing.
    """
    there: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            there.update(tensors.keys())
    for name, layer in nested_layers(model).items():
        for tensor in layer.state_dict():
            full = f"{name}.{tensor}"
            if there.isdisjoint(spellings(full, model)):
                raise PrecisionError(f"the checkpoint says that it is nested, but lacks {full}; get it again")


register_quantization_config(QUANT_METHOD)(NestedConfig)
register_quantizer(QUANT_METHOD)(NestedQuantizer)
