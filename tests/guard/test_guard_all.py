"""`guard_all`: every load that quantizes, nothing else, and only while it holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    BitsAndBytesConfig,
    GgufConfig,
    QuantoConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer

from optimum_qguard import QGuardInt8Config, guard_all
from optimum_qguard.guard.errors import QGuardConfigError

INT8 = {"load_in_8bit": True}


def load(folder: Path, config: Any = None) -> Any:
    arguments = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def is_guarded(model: Any) -> bool:
    return hasattr(model, "qguard_report")


@pytest.fixture(autouse=True)
def unguarded() -> Iterator[None]:
    before = AutoHfQuantizer.__dict__["from_config"]
    yield
    assert AutoHfQuantizer.__dict__["from_config"] is before, "guard was left on"


@pytest.mark.parametrize(
    "config",
    [BitsAndBytesConfig(**INT8), QuantoConfig(), INT8, {"quant_method": "quanto", "weights": "int4"}],
    ids=["bitsandbytes", "quanto", "bitsandbytes dict", "quanto dict"],
)
def test_guards_while_the_block_lasts(tiny_llama: Path, config: Any) -> None:
    with guard_all(seed=4):
        model = load(tiny_llama, config)
    assert len(model.qguard_report.tensors) == 14
    assert int(model.qguard_report.seed, 16) == 4
    assert not is_guarded(load(tiny_llama, config))


def test_is_what_qguard_config_does(tiny_llama: Path) -> None:
    with guard_all(method="gaussian", multiplier=0.5, seed=4):
        model = load(tiny_llama, INT8)
    by_config = load(tiny_llama, QGuardInt8Config(method="gaussian", multiplier=0.5, seed=4))
    for name, value in by_config.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_as_a_function_until_closed(tiny_llama: Path) -> None:
    guard = guard_all()
    try:
        assert is_guarded(load(tiny_llama, INT8))
        assert is_guarded(load(tiny_llama, INT8))
    finally:
        guard.close()
    assert not is_guarded(load(tiny_llama, INT8))
    guard.close()


def test_ends_with_an_exception(tiny_llama: Path) -> None:
    with pytest.raises(ZeroDivisionError), guard_all():
        1 / 0  # noqa: B018
    assert not is_guarded(load(tiny_llama, INT8))


def test_nested(tiny_llama: Path) -> None:
    with guard_all(seed=1):
        with guard_all(seed=2):
            assert int(load(tiny_llama, INT8).qguard_report.seed, 16) == 2
        assert int(load(tiny_llama, INT8).qguard_report.seed, 16) == 1
    assert not is_guarded(load(tiny_llama, INT8))


@pytest.mark.parametrize("first", [0, 1])
def test_closed_in_any_order(tiny_llama: Path, first: int) -> None:
    guards = [guard_all(seed=1), guard_all(seed=2)]
    guards[first].close()
    assert int(load(tiny_llama, INT8).qguard_report.seed, 16) == [2, 1][first]
    guards[1 - first].close()
    assert not is_guarded(load(tiny_llama, INT8))


def test_leaves_full_precision_loads_alone(tiny_llama: Path) -> None:
    with guard_all():
        model = load(tiny_llama)
    assert not is_guarded(model)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_leaves_quantized_checkpoints_alone(tiny_llama: Path, tmp_path: Path) -> None:
    plain = load(tiny_llama, INT8)
    plain.save_pretrained(tmp_path)
    with guard_all():
        again = load(tmp_path)
    assert not is_guarded(again)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_qguard_config_keeps_its_own_options(tiny_llama: Path) -> None:
    with guard_all(method="gaussian"):
        for config in (QGuardInt8Config(seed=1), json.loads(QGuardInt8Config(seed=1).to_json_string())):
            report = load(tiny_llama, config).qguard_report
            assert {tensor.method for tensor in report.tensors} == {"stochastic"}
            assert int(report.seed, 16) == 1


def test_leaves_gguf_alone() -> None:
    with guard_all():
        quantizer = AutoHfQuantizer.from_config(GgufConfig(dequantize=True), pre_quantized=False)
    assert quantizer.quantization_config.quant_method == "gguf"


def test_refuses_what_it_cannot_guard(tiny_llama: Path) -> None:
    with guard_all(), pytest.raises(QGuardConfigError, match=r"^AutoRoundConfig [^\n]*cannot be guarded[^\n]*$"):
        load(tiny_llama, AutoRoundConfig())


@pytest.mark.parametrize("options", [{"multiplier": -1.0}, {"noise": float("nan")}, {"method": "none"}], ids=str)
def test_options_that_make_no_sense_guard_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(QGuardConfigError):
        guard_all(**options)


def test_unknown_options_guard_nothing() -> None:
    with pytest.raises(TypeError, match="sigma"):
        guard_all(sigma=1)
