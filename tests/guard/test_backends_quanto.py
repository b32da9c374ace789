"""quanto stores exactly the symbols that guard chose, where its grid is fixed."""

from pathlib import Path

import pytest
import torch
from libraries import library_config
from loaded import assert_guarded_exactly
from transformers import AutoModelForCausalLM

from optimum_qguard import QGuardConfig, QGuardError

NAMES = ["quanto-int8", "quanto-int4", "quanto-int2", "quanto-float8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_symbols_are_the_drawn_ones(tiny_llama: Path, name: str, dtype: torch.dtype) -> None:
    config = QGuardConfig(library_config(name))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=dtype)
    # BF16 cannot hold quanto's int8 grid: see the format.
    expected = "uniform" if (name, dtype) == ("quanto-int8", torch.bfloat16) else "stochastic"
    assert {tensor.method for tensor in model.qguard_report.tensors} == {expected}
    assert len(model.qguard_report.tensors) == 14
    assert_guarded_exactly(model, tiny_llama)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_noise(tiny_llama: Path, name: str) -> None:
    config = QGuardConfig(library_config(name), method="uniform", multiplier=0.5)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.float32)
    assert_guarded_exactly(model, tiny_llama)


def test_stochastic_rounding_is_refused_where_the_grid_is_lost(tiny_llama: Path) -> None:
    config = QGuardConfig(library_config("quanto-int8"), method="stochastic")
    with pytest.raises(QGuardError, match=r"^[^\n]*\.weight: [^\n]*bfloat16[^\n]*method='auto'[^\n]*$"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


def test_modules_not_to_convert(tiny_llama: Path) -> None:
    config = QGuardConfig(library_config("quanto-int8", modules_to_not_convert=["lm_head", "model.layers.0"]))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert all("layers.1" in tensor.name for tensor in model.qguard_report.tensors)
    assert_guarded_exactly(model, tiny_llama)
