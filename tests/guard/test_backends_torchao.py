"""torchao stores exactly the symbols that guard chose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library_config
from loaded import assert_guarded_exactly, quantized_tensors
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM, TorchAoConfig

from optimum_qguard import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError

HQQ = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY


def load(folder: Path, config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = QGuardConfig(config, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torchao-int8", "torchao-int4", "torchao-float8"])
@pytest.mark.parametrize("method", ["auto", "gaussian"])
def test_symbols_are_the_drawn_ones(tiny_llama: Path, name: str, method: str, dtype: torch.dtype) -> None:
    model = load(tiny_llama, library_config(name), dtype, method=method)
    assert {tensor.method for tensor in model.qguard_report.tensors} == {method.replace("auto", "stochastic")}
    assert len(model.qguard_report.tensors) == 14
    assert_guarded_exactly(model, tiny_llama)


INT4 = {"weight_dtype": torch.int4}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (Int8WeightOnlyConfig(granularity=PerTensor()), "stochastic"),
        (Int8WeightOnlyConfig(granularity=PerGroup(64)), "stochastic"),
        (Int8DynamicActivationInt8WeightConfig(), "stochastic"),
        (IntxWeightOnlyConfig(torch.int3, PerAxis(0)), "stochastic"),
        (IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC), "uniform"),
        (IntxWeightOnlyConfig(torch.int6, PerGroup(128), MappingType.SYMMETRIC_NO_CLIPPING_ERR), "stochastic"),
        (Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)), "stochastic"),
        (Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2), "stochastic"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_grids(tiny_llama: Path, config: Any, method: str) -> None:
    model = load(tiny_llama, TorchAoConfig(config))
    assert {tensor.method for tensor in model.qguard_report.tensors} == {method}
    assert_guarded_exactly(model, tiny_llama)


def test_a_configuration_for_each_module(tiny_llama: Path) -> None:
    by_name = FqnToConfig(
        {
            "model.layers.0.mlp.up_proj": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
            r"re:.*\.down_proj": Float8WeightOnlyConfig(),
            "model.layers.1.self_attn.q_proj": None,
            "_default": Int8WeightOnlyConfig(),
        }
    )
    model = load(tiny_llama, TorchAoConfig(by_name))
    formats = {tensor.name.removeprefix("model.layers."): tensor.format for tensor in model.qguard_report.tensors}
    assert "bits=4" in formats["0.mlp.up_proj.weight"]
    assert "float8" in formats["0.mlp.down_proj.weight"]
    assert "float8" in formats["1.mlp.down_proj.weight"]
    assert "bits=8" in formats["1.mlp.up_proj.weight"]
    assert "1.self_attn.q_proj.weight" not in formats
    assert_guarded_exactly(model, tiny_llama)


def test_embeddings_are_guarded_where_they_are_quantized(tiny_llama: Path) -> None:
    both = FqnToConfig(
        {
            "model.embed_tokens": IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
            "lm_head": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        }
    )
    model = load(tiny_llama, TorchAoConfig(both, include_input_output_embeddings=True))
    assert quantized_tensors(model) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert_guarded_exactly(model, tiny_llama)


def test_embeddings_are_left_alone_where_torchao_leaves_them(tiny_llama: Path) -> None:
    model = load(tiny_llama, TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True))
    assert "lm_head.weight" in quantized_tensors(model)
    assert "model.embed_tokens.weight" not in quantized_tensors(model)
    assert_guarded_exactly(model, tiny_llama)


def test_modules_not_to_convert(tiny_llama: Path) -> None:
    model = load(
        tiny_llama, TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", "model.layers.0"])
    )
    assert all("layers.1" in tensor.name for tensor in model.qguard_report.tensors)
    assert_guarded_exactly(model, tiny_llama)


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(granularity=PerRow(dim=0)),
        IntxWeightOnlyConfig(torch.int4, PerGroup(32), intx_choose_qparams_algorithm=HQQ),
    ],
    ids=["rows along dimension 0", "HQQ"],
)
def test_what_guard_does_not_know_is_refused(tiny_llama: Path, config: Any) -> None:
    with pytest.raises(QGuardConfigError, match=r"^torchao's [^\n]*$"):
        load(tiny_llama, TorchAoConfig(config))


def test_a_group_that_does_not_divide_the_rows_is_one_line(tiny_llama: Path) -> None:
    with pytest.raises(QGuardError, match=r"^the model was not loaded: [^\n]*96[^\n]*$"):
        load(tiny_llama, library_config("torchao-int4", group_size=96))


def test_dynamic_float8_needs_hardware_of_its_own(tiny_llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it would run")
    with pytest.raises(QGuardError, match=r"^the model was not loaded: [^\n]*$"):
        load(tiny_llama, TorchAoConfig(Float8DynamicActivationFloat8WeightConfig()))
