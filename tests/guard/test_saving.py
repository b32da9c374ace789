"""What a saved guarded model is: the library's own checkpoint, and beside it what was done."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library_config
from transformers import AutoModelForCausalLM

from optimum_qguard import GuardReport, QGuardConfig, QGuardInt8Config, QGuardNF4Config
from optimum_qguard.guard.report import TensorReport

SERIALIZABLE = ["bnb-int8", "bnb-nf4", "bnb-nf4-double", "bnb-fp4", "torchao-int8", "torchao-int4", "torchao-float8"]
TOKENS = torch.arange(3, 35).unsqueeze(0)

WITHOUT_THE_PACKAGE = """
import sys, torch
from pathlib import Path
sys.modules["optimum_qguard"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "qguard_report")
    with torch.no_grad():
        torch.save(model(torch.arange(3, 35).unsqueeze(0)).logits, Path(folder) / "logits.pt")
assert not any(name.startswith("optimum_qguard.") for name in sys.modules)
"""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def logits_with_and_without(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits of a guarded model, and of what it saved in a process that cannot import this package, by library."""
    folder = tmp_path_factory.mktemp("saved")
    expected = {}
    for library in SERIALIZABLE:
        config = QGuardConfig(library_config(library))
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        # Saved before it runs: on CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights when they are first used,
        # and loses their scales when such weights are saved.
        model.save_pretrained(folder / library)
        expected[library] = logits(model)
    program = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(folder / library for library in SERIALIZABLE)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {library: (expected[library], torch.load(folder / library / "logits.pt")) for library in SERIALIZABLE}


@pytest.mark.parametrize("library", SERIALIZABLE)
def test_loads_without_this_package_with_identical_logits(
    logits_with_and_without: dict[str, tuple[torch.Tensor, torch.Tensor]], library: str
) -> None:
    guarded, plain = logits_with_and_without[library]
    assert torch.equal(guarded, plain)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    config = QGuardNF4Config(method="gaussian", multiplier=0.5, seed=11)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2-moe"])
def test_loads_again_with_identical_logits(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(name), quantization_config=QGuardInt8Config())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_configuration_saved_is_the_librarys(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "guarded")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=library_config("bnb-nf4"))
    plain.save_pretrained(tmp_path / "plain")
    guarded = json.loads((tmp_path / "guarded" / "config.json").read_text())
    assert guarded == json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "qguard" not in json.dumps(guarded)
    files = {file.name for file in (tmp_path / "guarded").iterdir()}
    assert files - {file.name for file in (tmp_path / "plain").iterdir()} == {"qguard.json", "README.md"}


def test_qguard_json_is_the_whole_report(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    text = (tmp_path / "qguard.json").read_text()
    assert GuardReport.model_validate_json(text) == model.qguard_report
    fields = json.loads(text)
    assert fields.keys() == GuardReport.model_fields.keys()
    assert all(tensor.keys() == TensorReport.model_fields.keys() for tensor in fields["tensors"])
    assert fields["model"] == str(tiny_llama)
    assert fields["method"] == "gaussian"
    assert (fields["noise"], fields["multiplier"]) == ("per_layer", 0.5)
    assert int(fields["seed"], 16) == 11
    assert not fields["fresh_seed"]
    assert fields["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert sum(tensor["weights"] for tensor in fields["tensors"]) == model.qguard_report.weights == 294912


def test_the_report_in_words(model: Any) -> None:
    report = model.qguard_report
    assert str(report) == repr(report)
    assert "14 tensors (294,912 weights) guarded by Gaussian noise" in str(report)
    assert f"{report.share_changed:.1%}" in str(report)
    assert str(report).endswith("0b")
    assert "\n" not in str(report)


def test_a_model_card_is_merged_not_overwritten(model: Any, tmp_path: Path) -> None:
    card = "---\nlicense: mit # ours\ntags:\n- llama\n---\n\n# My model\n\nMy words.\n"
    (tmp_path / "README.md").write_text(card)
    model.save_pretrained(tmp_path)
    merged = (tmp_path / "README.md").read_text()
    assert "license: mit # ours\n" in merged
    assert "# My model\n\nMy words.\n" in merged
    for tag in ("llama", "quantization-guarded", "qguard"):
        assert f"- {tag}\n" in merged
    assert merged.count("## Guarded quantization") == 1
    assert "`qguard.json`" in merged
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == merged


def test_a_new_model_card(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\ntags:\n- quantization-guarded\n- qguard\n---\n")
    assert "294,912 weights" in card


def test_a_copy_saves_itself(model: Any, tmp_path: Path) -> None:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight.fill_(3)
    copied.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, copied.model.norm.weight)
    assert not torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert GuardReport.model_validate_json((tmp_path / "qguard.json").read_text()) == model.qguard_report


def test_a_pickled_model_is_whole(model: Any, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert again.qguard_report == model.qguard_report
    again.save_pretrained(tmp_path)
    assert (tmp_path / "qguard.json").exists()
    assert torch.equal(logits(again), logits(model))


def test_save_options_reach_transformers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB", variant="guarded")
    assert len(list((tmp_path / "shards").glob("model.guarded-*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker" / "qguard.json").exists()


def test_a_guarded_checkpoint_loaded_again_is_no_guarded_load(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again, "qguard_report")
