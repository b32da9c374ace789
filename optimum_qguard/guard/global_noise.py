"""One amplitude for all tensors of a model that transformers is loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.guard.errors import QGuardConfigError


def global_half_width(
    model: Any,
    files: Sequence[str] | None,
    quantizer: Any,
    expected: set[str],
    half_width_of: Callable[[nn.Module, str, Tensor], float],
) -> float:
    """Equation (4): the median over tensors of their half-width, from one pass over the checkpoint's files."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise QGuardConfigError("noise='global' reads the checkpoint twice and needs it in safetensors files")
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found = []
    for file in files:
        # transformers builds models under torch.device("meta"), where a tensor made on the way would hold nothing.
        with safe_open(file, framework="pt") as tensors, torch.device("cpu"):
            for key in tensors.keys():  # noqa: SIM118
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if name in expected:
                    found.append(half_width_of(model, name, tensors.get_tensor(key)))
    if not found:
        raise QGuardConfigError("noise='global' found no tensor in the checkpoint that the quantizer will quantize")
    return median(found)
