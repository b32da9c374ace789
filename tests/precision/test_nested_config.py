"""A nested model that is saved and loaded is the same, and an incomplete one is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig

from optimum_qguard import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.precision import BitMap, NestedConfig, PrecisionError, nest, set_bits
from optimum_qguard.precision.nested import nested_layers

TOKENS = torch.arange(8)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = nest(tiny_model(name), group_size=64)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    for width in (8, 3):
        set_bits(model, width)
        set_bits(loaded, width)
        assert torch.equal(logits(model), logits(loaded))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_another_dtype_changes_no_code(tmp_path: Path) -> None:
    model = nest(tiny_model("llama"), 4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    for name, layer in nested_layers(loaded).items():
        assert layer.bits == 4
        assert torch.equal(layer.dequantize(3), nested_layers(model)[name].dequantize(3))
        assert layer.weight.dtype == torch.float16


def test_bit_map_travels(tmp_path: Path) -> None:
    bitmap = BitMap({"layers.0": None, "*.down_proj": 8, "*": 4})
    model = nest(tiny_model("llama"), bitmap)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    widths = [{name: layer.bits for name, layer in nested_layers(each).items()} for each in (model, loaded)]
    assert widths[0] == widths[1]
    assert loaded.config.quantization_config.bits == bitmap


def test_nested_while_loading(tmp_path: Path) -> None:
    plain = tiny_model("bert")
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=NestedConfig(6, group_size=32))
    assert torch.equal(logits(loaded), logits(nest(plain, 6, group_size=32)))


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = nest(tiny_model("llama"), 4)
    model.save_pretrained(tmp_path)
    program = (
        "import optimum_qguard, sys, torch; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(model(torch.arange(8)[None]).logits.double().sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert float(printed.stdout) == pytest.approx(logits(model).double().sum().item(), rel=1e-6)


def test_a_missing_tensor(tmp_path: Path) -> None:
    nest(tiny_model("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.grid"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PrecisionError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.grid"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": [["*", 1]]}, "a width is a whole number from 2 to 8"),
        ({"bits": [["nope", 4]]}, "'nope' matches no module"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_an_edited_configuration(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    nest(tiny_model("llama")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(PrecisionError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_guard_does_not_know_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(QGuardConfigError, match="qguard-nested"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QGuardConfig(NestedConfig()))


def test_another_quantization_of_a_nested_checkpoint(tmp_path: Path) -> None:
    nest(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NestedConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
