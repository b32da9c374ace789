"""torchao: integer and float8 weights, with or without dynamically quantized activations."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import TorchAoConfig

from optimum_qguard.formats import Format
from optimum_qguard.formats.float8 import Float8
from optimum_qguard.formats.torchao_int import TorchaoInt, TorchaoInt4
from optimum_qguard.guard.backends.backend import Backend
from optimum_qguard.guard.errors import QGuardConfigError


def _int8(**arguments: Any) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), **arguments)


def _int4(group_size: int = 32, **arguments: Any) -> TorchAoConfig:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(group_size)), **arguments)  # type: ignore[attr-defined]


def _float8(**arguments: Any) -> TorchAoConfig:
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig(), **arguments)


class TorchAO(Backend):
    quant_methods = ("torchao",)
    presets = {"torchao-int8": _int8, "torchao-int4": _int4, "torchao-float8": _float8}
    requirement = ("torchao", "torchao")

    def check(self, config: Any) -> None:
        for inner in _configs(config.quant_type):
            _format(inner)

    def quantizes(self, config: Any, module: nn.Module, parameter: str) -> bool:
        if hasattr(config.quant_type, "fqn_to_config"):
            return _config_for(config.quant_type, parameter) is not None
        # One configuration for all modules: torchao applies it to linear layers only.
        return not isinstance(module, nn.Embedding)

    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        return _format(_config_for(config.quant_type, parameter))


def _configs(config: Any) -> list[Any]:
    """The configuration itself, or those that ``FqnToConfig`` gives to modules by name."""
    return [inner for inner in getattr(config, "fqn_to_config", {"": config}).values() if inner is not None]


def _config_for(config: Any, parameter: str) -> Any:
    by_name = getattr(config, "fqn_to_config", None)
    if by_name is None:
        return config
    module = parameter.rpartition(".")[0]
    for name in (parameter, module):
        if name in by_name:
            return by_name[name]
    for pattern, inner in by_name.items():
        if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], name) for name in (parameter, module)):
            return inner
    return by_name.get("_default")


def _format(config: Any) -> Format:
    import torch

    kind = type(config).__name__
    if kind in (
        "Int8WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Int8StaticActivationInt8WeightConfig",
    ):
        return TorchaoInt(8, _group_size(config.granularity, kind), scale_dtype=torch.float32, eps=2.0**-23)
    if kind in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"):
        prefix = "" if kind == "IntxWeightOnlyConfig" else "weight_"
        algorithm = getattr(config, "intx_choose_qparams_algorithm", None)
        if algorithm is not None and algorithm.name != "AFFINE":
            raise QGuardConfigError(f"torchao's {kind} with {algorithm.name} searches its scales; guard needs AFFINE")
        return TorchaoInt(
            int(str(config.weight_dtype).removeprefix("torch.int")),
            _group_size(getattr(config, f"{prefix}granularity"), kind),
            mapping=getattr(config, f"{prefix}mapping_type").name.lower(),
            scale_dtype=getattr(config, f"{prefix}scale_dtype"),
        )
    if kind == "Int4WeightOnlyConfig":
        return TorchaoInt4(config.group_size)
    if kind == "PrototypeInt4WeightOnlyConfig":
        return TorchaoInt4(config.group_size, eps=1e-6)
    if kind == "Float8WeightOnlyConfig":
        return Float8(config.weight_dtype, "row", "torchao")
    if kind == "Float8DynamicActivationFloat8WeightConfig":
        granularity = config.granularity[-1] if isinstance(config.granularity, (list, tuple)) else config.granularity
        per_tensor = type(granularity).__name__ == "PerTensor"
        return Float8(config.weight_dtype, "tensor" if per_tensor else "row", "torchao")
    raise QGuardConfigError(
        f"torchao's {kind} cannot be guarded: guard does not know its grid. It knows Int8WeightOnlyConfig, "
        "Int4WeightOnlyConfig, IntxWeightOnlyConfig, Float8WeightOnlyConfig and their dynamic-activation forms"
    )


def _group_size(granularity: Any, kind: str) -> int | None:
    if isinstance(granularity, (list, tuple)):
        granularity = granularity[-1]
    name = type(granularity).__name__
    if name == "PerGroup":
        return int(granularity.group_size)
    if (name == "PerRow" and granularity.dim in (-1, 1)) or (name == "PerAxis" and granularity.axis == 0):
        return -1
    if name == "PerTensor":
        return None
    raise QGuardConfigError(f"torchao's {kind} with granularity {granularity} cannot be guarded")


backend = TorchAO()
