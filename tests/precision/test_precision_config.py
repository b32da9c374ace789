"""`PrecisionConfig` through the real torchao: the widths of the map, symbol for symbol, saved plainly, guarded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import stored
from loaded import assert_guarded_exactly, quantized_tensors
from tiny_models import save_tiny, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from optimum_qguard import PrecisionConfig, QGuardConfig
from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.decoding import width_format
from optimum_qguard.precision.errors import PrecisionError

EVERY_WIDTH = BitMap(
    {
        "layers.0.self_attn.q_proj": 2,
        "layers.0.self_attn.*": None,
        "*.layers.0.self_attn.*": 3,
        "up_proj": 4,
        "gate_proj": 5,
        "q_proj": 6,
        "o_proj": 7,
        "down_proj": 8,
    }
)


def load(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(name: str, **options: Any) -> Path:
        return save_tiny(name, tmp_path_factory.mktemp(name) / "model", **options)

    return save


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_stores_the_symbols_of_each_width(
    tiny_llama: Path, group_size: int | None, mapping: Any, dtype: torch.dtype
) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    widths = {kind: bits for bits, kind in enumerate(kinds, 2)}
    config = PrecisionConfig(widths, group_size=group_size, mapping=mapping)
    model = load(tiny_llama, config, dtype)
    full = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    assert len(quantized_tensors(model)) == 14
    for name in quantized_tensors(model):
        bits = widths[name.split(".")[-2]]
        weight = full.get_parameter(name).data
        expected = width_format(bits, group_size, mapping).quantize(weight, name)
        module = model.get_submodule(name.removesuffix(".weight"))
        codes, values = stored(module, expected.format, weight.shape)
        assert torch.equal(codes, expected.codes.long())
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(values.float(), expected.dequantize(), rtol=tolerance, atol=tolerance)


def test_what_the_map_leaves_is_left(tiny_llama: Path) -> None:
    model = load(tiny_llama, PrecisionConfig({"layers.0": None, "q_proj": None, "*": 4}))
    kinds = ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in quantized_tensors(model)} == set(kinds)
    assert all(".layers.1." in name for name in quantized_tensors(model))


def test_biases_are_left_alone(folder: Callable[..., Path]) -> None:
    model = load(folder("llama", attention_bias=True), PrecisionConfig({"*": 4}))
    assert len(quantized_tensors(model)) == 14
    assert type(model.model.layers[0].self_attn.q_proj.bias) is torch.nn.Parameter


def test_the_output_head(tiny_llama: Path) -> None:
    model = load(tiny_llama, PrecisionConfig({"lm_head": 8, "*": 4}))
    assert "lm_head.weight" in quantized_tensors(model)
    assert "model.embed_tokens.weight" not in quantized_tensors(model)


def test_a_saved_model_loads_without_this_package(tiny_llama: Path, tmp_path: Path) -> None:
    bitmap = BitMap({"layers.0.mlp": 2, "q_proj": None, "down_proj": 8, "*": 5})
    model = load(tiny_llama, PrecisionConfig(bitmap))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert "qguard" not in json.dumps(config)
    program = (
        "import sys, torch, transformers as t;"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert not any(name.startswith('optimum_qguard') for name in sys.modules);"
        "torch.save(m(torch.arange(12)[None]).logits, sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(12)[None]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guarded(tiny_llama: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    bitmap = BitMap({"layers.0.mlp": 2, "q_proj": None, "v_proj": 3, "o_proj": 4, "k_proj": 6, "up_proj": 7, "*": 5})
    model = load(tiny_llama, QGuardConfig(PrecisionConfig(bitmap)), dtype)
    widths = bitmap.resolve(tiny_model("llama"))
    by_name = {tensor.name.removesuffix(".weight"): tensor for tensor in model.qguard_report.tensors}
    assert set(by_name) == {name for name, bits in widths.items() if bits is not None}
    for name, tensor in by_name.items():
        assert f"bits={widths[name]}," in tensor.format
        assert tensor.method == "stochastic"
    assert type(model.config.quantization_config) is TorchAoConfig
    assert_guarded_exactly(model, tiny_llama)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


@pytest.mark.parametrize(
    ("options", "method"),
    [({"method": "gaussian"}, "gaussian"), ({"noise": "global"}, "gaussian"), ({"compensate": ["a b"]}, "compensated")],
)
def test_guarded_in_other_ways(tmp_path: Path, options: dict[str, Any], method: str) -> None:
    from tiny_models import save_tokenizer

    save_tokenizer(save_tiny("llama", tmp_path))
    options = {"compensate": ["w1 w2 w3 w4 " * 80]} if "compensate" in options else options
    model = load(tmp_path, QGuardConfig(PrecisionConfig({"layers.0": 3, "*": 6}), **options))
    assert {tensor.method for tensor in model.qguard_report.tensors} == {method}
    assert len(model.qguard_report.tensors) == 14


def test_guarded_with_zero_points(tiny_llama: Path) -> None:
    model = load(tiny_llama, QGuardConfig(PrecisionConfig({"layers.0": 4, "*": 8}, mapping="asymmetric")))
    assert {tensor.method for tensor in model.qguard_report.tensors} == {"uniform"}
    assert_guarded_exactly(model, tiny_llama)


def test_dict_round_trip() -> None:
    config = PrecisionConfig({"z": 4, "*.b": None, "*": 8}, group_size=None, mapping="asymmetric")
    text = config.to_json_string(use_diff=False)
    again = AutoQuantizationConfig.from_dict(json.loads(text))
    assert type(again) is PrecisionConfig
    assert again.bitmap == config.bitmap
    assert again.to_dict() == config.to_dict()
    guarded = QGuardConfig.from_dict(json.loads(QGuardConfig(config).to_json_string(use_diff=False)))
    assert guarded.quantization_config.to_dict() == config.to_dict()


def test_the_same_configuration_loads_twice(tiny_llama: Path) -> None:
    config = PrecisionConfig({"q_proj": 3, "*": 8})
    first, second = load(tiny_llama, config), load(tiny_llama, config)
    assert torch.equal(first(torch.arange(9)[None]).logits, second(torch.arange(9)[None]).logits)


def refused(says: str) -> Any:
    return pytest.raises(PrecisionError, match=rf"^[^\n]*{says}[^\n]*$")


@pytest.mark.parametrize("guarded", [False, True])
def test_models_that_are_refused(folder: Callable[..., Path], tiny_llama: Path, guarded: bool) -> None:
    def config(*arguments: Any, **options: Any) -> Any:
        made = PrecisionConfig(*arguments, **options)
        return QGuardConfig(made) if guarded else made

    with refused("matches no module"):
        load(tiny_llama, config({"typo": 4}))
    with refused("leaves every layer as it is"):
        load(tiny_llama, config({"*": None}))
    with refused("has 128 input features, which 96 does not divide"):
        load(tiny_llama, config({"*": 4}, group_size=96))
    with refused("transformer.h.0.attn.c_attn is a Conv1D, as in GPT-2"):
        load(folder("gpt2"), config({"*": 4}))
    with refused("are one and the same tensor, but would have different widths"):
        load(folder("llama-tied"), config({"lm_head": 8, "*": 4}))
    with refused("fused into one tensor"):
        load(folder("mixtral"), config({"*": 4}))


def test_layers_that_a_model_keeps_at_full_precision(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", {"model.layers.0.mlp"})
    with refused("model.layers.0.mlp.gate_proj: transformers keeps this layer of a LlamaForCausalLM at full precision"):
        load(tiny_llama, PrecisionConfig({"*": 4}))
    assert len(quantized_tensors(load(tiny_llama, PrecisionConfig({"layers.0.mlp": None, "*": 4})))) == 11


def test_models_that_are_not_for_text(folder: Callable[..., Path]) -> None:
    model = AutoModelForImageClassification.from_pretrained(
        folder("vit"), quantization_config=PrecisionConfig({"classifier": None, "*": 4})
    )
    assert len(quantized_tensors(model)) == 12
    model = AutoModelForSeq2SeqLM.from_pretrained(folder("t5"), quantization_config=PrecisionConfig({"*": 4}))
    assert "decoder.block.1.layer.2.DenseReluDense.wo.weight" in quantized_tensors(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "quanto"}, "a width for each layer needs 'torchao'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 2.5}, "group_size is 2.5"),
        ({"mapping": "affine"}, "mapping is 'affine'"),
        ({"quant_method": "torchao"}, "quant_method is 'torchao'"),
    ],
)
def test_bad_configurations(options: dict[str, Any], says: str) -> None:
    with refused(says):
        PrecisionConfig({"*": 4}, **options)


def test_a_config_json_that_was_edited(folder: Callable[..., Path]) -> None:
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = PrecisionConfig({"*": 4}).to_dict()
    (path / "config.json").write_text(json.dumps(config))
    with refused("which no saved model has"):
        AutoModelForCausalLM.from_pretrained(path)
