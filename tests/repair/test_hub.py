"""Anchors from the Hub, and repaired models to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from repair_models import words
from test_anchor import llama, train
from transformers import AutoModelForCausalLM

from optimum_qguard import AnchorCallback
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.hub import push
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.run import repair_checkpoint

FAST: dict[str, Any] = {
    "text": words(400),
    "steps": 2,
    "block_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "strength": 50.0,
    "checkpoint_every": 0,
    "device": "cpu",
}


def test_an_anchor_on_the_hub_is_the_folder(hub: HubServer, tmp_path: Path) -> None:
    """At the commit that is named, not at a later one."""
    llama(1).save_pretrained(tmp_path / "clean")
    commit = hub.add_repository("org/clean", tmp_path / "clean")
    llama(2).save_pretrained(tmp_path / "later")
    weights = (tmp_path / "later" / "model.safetensors").read_bytes()
    hub.commit("org/clean", {"model.safetensors": weights})
    trained = []
    for anchor in (tmp_path / "clean", f"org/clean@{commit}", "org/clean"):
        trained.append(llama())
        train(trained[-1], tmp_path, AnchorCallback(anchor, strength=2.0, decoupled=True))
    folder, named, later = ([weight.detach() for weight in model.parameters()] for model in trained)
    assert all(torch.equal(a, b) for a, b in zip(folder, named, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(folder, later, strict=True))


def test_an_anchor_that_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="org/missing") as caught:
        train(llama(), tmp_path, AnchorCallback("org/missing", strength=1.0))
    assert "\n" not in str(caught.value)
    hub.add_repository("org/other", {"README.md": b"no weights"})
    with pytest.raises((CheckpointError, RepairError), match=r"org--other|org/other"):
        train(llama(), tmp_path, AnchorCallback("org/other", strength=1.0))


def test_a_repaired_model_goes_up(hub: HubServer, clean: Path, damaged: Path, tmp_path: Path) -> None:
    commits = {name: hub.add_repository(f"org/{name}", folder) for name, folder in (("c", clean), ("d", damaged))}
    report = repair_checkpoint("org/d", tmp_path / "out", anchor="org/c", **FAST)
    done = push(tmp_path / "out", "org/repaired")
    stored = hub.files("org/repaired")
    assert {"repair.json", "model.safetensors", "README.md"} <= set(done.files) <= set(stored)
    assert hub.repository("org/repaired").commits[done.commit].title == "Upload a checkpoint made by qguard repair"
    card = stored["README.md"].decode()
    assert "## Repaired" in card
    found = yaml.safe_load(card.split("---\n")[1])
    assert found["license"] == "mit"
    assert found["tags"] == ["repaired", "qguard"]
    assert (found["base_model"], found["base_model_relation"]) == ("org/d", "finetune")
    block = found["qguard"]
    assert (block["schema_version"], block["method"]) == (1, "repair")
    assert block["source"] == {"model": "org/d", "revision": commits["d"]}
    assert block["anchor"] == {"model": "org/c", "revision": commits["c"]}
    assert (block["parameters"]["recipe"]["steps"], block["parameters"]["recipe"]["strength"]) == (2, 50)
    assert block["verification"] == {
        "steps_done": 2,
        "anchor_distance_before": report.anchor_distance_before,
        "anchor_distance_after": report.anchor_distance_after,
    }
    back = AutoModelForCausalLM.from_pretrained("org/repaired")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), here.parameters(), strict=True))
