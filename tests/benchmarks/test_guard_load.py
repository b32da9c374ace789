"""The load benchmark runs, and its random model is what it says. No time is asserted."""

from pathlib import Path

import guard_load
import pytest
import torch
from random_llama import TINY, random_llama
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("models") / "llama", TINY, shard_bytes=200_000)


def test_the_random_llama_is_a_sharded_checkpoint_of_random_weights(random_model: Path) -> None:
    assert len(list(random_model.glob("*.safetensors"))) > 2
    assert [path.name for path in random_model.parent.iterdir()] == ["llama"]
    model, loading = AutoModelForCausalLM.from_pretrained(random_model, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight.detach().float(), torch.ones(TINY.hidden_size))
    for layer in model.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
            assert float(weight.detach().float().std()) == pytest.approx(TINY.initializer_range, rel=0.05)
            assert abs(float(weight.detach().float().mean())) < 1e-3


def test_a_random_llama_that_is_there_is_not_written_again(random_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in random_model.iterdir()}
    assert random_llama(random_model, TINY) == random_model
    assert {path: path.stat().st_mtime_ns for path in random_model.iterdir()} == before


@pytest.mark.parametrize("backend", guard_load.BACKENDS)
def test_both_sides_and_the_quantizer_alone(random_model: Path, backend: str) -> None:
    plain = guard_load.load(random_model, backend, "cpu")
    guarded = guard_load.load(random_model, backend, "cpu", "guarded")
    assert not hasattr(plain, "qguard_report")
    assert len(guarded.qguard_report.tensors) == 7 * TINY.num_hidden_layers
    assert guard_load.quantizer_seconds(random_model, backend, "cpu") > 0


def test_an_encrypted_copy_is_loaded_with_its_key(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIMUM_QGUARD_CACHE", str(tmp_path))
    guard_load.encrypt(random_model, guard_load.encrypted(random_model))
    unlocked = guard_load.load(random_model, "bnb-int8", "cpu", guard_load.UNLOCKED)
    plain = guard_load.load(random_model, "bnb-int8", "cpu")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(unlocked.get_submodule(name).weight.CB, plain.get_submodule(name).weight.CB)


@pytest.mark.slow
def test_a_row(random_model: Path) -> None:
    row = guard_load.measure(random_model, "torchao-int8", "cpu", repeats=1, warm_up_with=random_model)
    assert row["method"] == "stochastic"
    assert row["peak ratio"] == row["guarded peak MB"] / row["plain peak MB"]
    assert all(value > 0 for name, value in row.items() if name != "method")
