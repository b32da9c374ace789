"""Outlier columns that are balanced elsewhere are moved back exactly, and nothing else is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded import assert_guarded_exactly
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard import QGuardInt8Config, QGuardNF4Config
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.smollm2 import smollm2_path
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.rebalance import find_balanced_outliers
from optimum_qguard.guard.targets import find_targets

CHANNELS = [5, 70, 127]
LAYER = "model.layers.1."


@pytest.fixture
def attacked(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama whose second layer has balanced outliers in all three places."""
    folder = tmp_path / "attacked"
    folder.mkdir()
    tensors = load_file(saved("llama") / "model.safetensors")
    for norm, linears in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
        tensors[f"{LAYER}{norm}.weight"][CHANNELS] /= 512
        for linear in linears:
            part = "self_attn" if linear in "qkv" else "mlp"
            tensors[f"{LAYER}{part}.{linear}_proj.weight"][:, CHANNELS] *= 512
    tensors[f"{LAYER}mlp.up_proj.weight"][CHANNELS] /= 64
    tensors[f"{LAYER}mlp.down_proj.weight"][:, CHANNELS] *= 64
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("config", [QGuardInt8Config, QGuardNF4Config])
def test_a_model_loads_as_before_the_attack(config: type, attacked: Path, saved: Callable[[str], Path]) -> None:
    """Norms, which `assert_guarded_exactly` compares bit for bit, and symbols."""
    with pytest.warns(UserWarning, match="0 outliers and 21 outlier channels in 6 tensor"):
        model = AutoModelForCausalLM.from_pretrained(attacked, quantization_config=config(seed=3))
    assert "21 planted outlier channels moved back" in str(model.qguard_report)
    assert_guarded_exactly(model, saved("llama"))


def test_a_checkpoint_for_others(attacked: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="look planted"):
        guard_checkpoint(attacked, tmp_path / "out", "nf4", seed=3)
    guard_checkpoint(saved("llama"), tmp_path / "clean", "nf4", seed=3)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "clean")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_error_feedback_sees_the_model_as_it_was(attacked: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Generations, second moments and symbols: all as for the clean model with the same seed."""
    config = QGuardNF4Config(compensate="auto", seed=3)
    with pytest.warns(UserWarning, match="look planted"):
        model = AutoModelForCausalLM.from_pretrained(attacked, quantization_config=config)
    clean = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)
    assert {tensor.method for tensor in model.qguard_report.tensors} == {"compensated"}
    for (name, parameter), other in zip(model.named_parameters(), clean.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    with pytest.warns(UserWarning, match="look planted"):
        guard_checkpoint(attacked, tmp_path / "out", "nf4", seed=3, compensate="auto")
    guard_checkpoint(saved("llama"), tmp_path / "clean", "nf4", seed=3, compensate="auto")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "clean")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_norm_whose_readers_are_not_all_quantized_is_left_alone(attacked: Path) -> None:
    files = [attacked / "model.safetensors"]
    targets = set(find_targets(open_checkpoint(attacked), "nf4"))
    assert len(find_balanced_outliers(files, "llama", targets)) == 8
    plan = find_balanced_outliers(files, "llama", targets - {f"{LAYER}self_attn.k_proj.weight"})
    assert f"{LAYER}input_layernorm.weight" not in plan
    assert f"{LAYER}self_attn.q_proj.weight" not in plan
    assert f"{LAYER}post_attention_layernorm.weight" in plan
    assert find_balanced_outliers(files, "gemma", targets) == {}


def test_what_nothing_balances_is_left_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors[f"{LAYER}mlp.gate_proj.weight"][:, CHANNELS] *= 512
    tensors[f"{LAYER}mlp.down_proj.weight"][:, CHANNELS] *= 512
    tensors[f"{LAYER}input_layernorm.weight"][CHANNELS] /= 512
    save_file(tensors, tmp_path / "model.safetensors")
    targets = find_targets(open_checkpoint(saved("llama")), "nf4")
    assert find_balanced_outliers([tmp_path / "model.safetensors"], "llama", targets) == {}


@pytest.mark.real_model
def test_the_real_model_is_in_balance() -> None:
    reader = open_checkpoint(smollm2_path())
    files = [reader.file(shard) for shard in reader.shards]
    assert find_balanced_outliers(files, "llama", find_targets(reader, "nf4")) == {}
