"""bitsandbytes stores exactly the symbols that guard chose."""

from pathlib import Path

import pytest
import torch
from libraries import library_config
from loaded import assert_guarded_exactly
from transformers import AutoModelForCausalLM

from optimum_qguard import QGuardConfig, QGuardInt8Config, QGuardNF4Config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bnb-int8", "bnb-nf4", "bnb-nf4-double", "bnb-fp4"])
@pytest.mark.parametrize("method", ["auto", "gaussian", "uniform"])
def test_symbols_are_the_drawn_ones(tiny_llama: Path, name: str, method: str, dtype: torch.dtype) -> None:
    config = QGuardConfig(library_config(name), method=method)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=dtype)
    assert {tensor.method for tensor in model.qguard_report.tensors} == {method.replace("auto", "stochastic")}
    assert len(model.qguard_report.tensors) == 14
    assert_guarded_exactly(model, tiny_llama)


@pytest.mark.parametrize("config", [QGuardInt8Config(), QGuardNF4Config()], ids=["int8", "nf4"])
def test_transposed_weights_are_guarded_along_the_rows_that_are_quantized(config: QGuardConfig, saved) -> None:  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(saved("gpt2"), quantization_config=config)
    assert {tensor.name.rsplit(".", 2)[1] for tensor in model.qguard_report.tensors} == {"c_attn", "c_proj", "c_fc"}
    assert_guarded_exactly(model, saved("gpt2"))


def test_modules_that_are_skipped(tiny_llama: Path) -> None:
    config = QGuardInt8Config(llm_int8_skip_modules=["lm_head", "q_proj", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    names = [tensor.name for tensor in model.qguard_report.tensors]
    assert len(names) == 6
    assert not any("q_proj" in name or "layers.1" in name or "lm_head" in name for name in names)
    assert_guarded_exactly(model, tiny_llama)


def test_the_head_is_guarded_where_it_is_quantized(tiny_llama: Path) -> None:
    config = QGuardInt8Config(llm_int8_skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert "lm_head.weight" in {tensor.name for tensor in model.qguard_report.tensors}
    assert_guarded_exactly(model, tiny_llama)
