"""Guarded and encrypted models on the Hub and back, through the real clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import OTHER_TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_qguard import (
    GuardReport,
    Key,
    QGuardInt8Config,
    QGuardUnlockConfig,
    decrypt_checkpoint,
    encrypt_checkpoint,
)
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.guard.errors import QGuardError
from optimum_qguard.hub import Published, push

TOKENS = torch.arange(3, 35).unsqueeze(0)
COLLAPSE = {
    "model": "encrypted",
    "reference": "original",
    "rows": [
        {
            "format": None,
            "original": {"status": "measured", "figures": {"perplexity": {"kl": 0.0, "perplexity": 6.5}}},
            "protected": {"status": "measured", "figures": {"perplexity": {"kl": 0.0, "perplexity": 6.5}}},
        },
        {
            "format": "bnb-int8",
            "original": {"status": "measured", "figures": {"perplexity": {"kl": 0.005, "perplexity": 6.6}}},
            "protected": {"status": "kl is NaN", "figures": {"perplexity": {"kl": None, "perplexity": 9e9}}},
        },
        {"format": "quanto-int4", "protected": {"status": "refused: cannot /home/me", "figures": {}}},
    ],
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def data(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def key() -> Key:
    return Key.generate()


@pytest.fixture(scope="module")
def encrypted_once(tiny_llama: Path, key: Key, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encrypted") / "out"
    encrypt_checkpoint(tiny_llama, out, key=key)
    return out


@pytest.fixture
def encrypted(encrypted_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(encrypted_once, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def guarded(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=QGuardInt8Config())


def test_an_encrypted_model_goes_up_and_comes_back(
    hub: HubServer, encrypted: Path, tiny_llama: Path, key: Key, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in encrypted.iterdir()}
    done = push(encrypted, "org/protected")
    assert done.commit == hub.head("org/protected")
    assert done.url == f"{hub.url}/org/protected/commit/{done.commit}"
    assert {path.name: path.read_bytes() for path in encrypted.iterdir()} == before
    stored = hub.files("org/protected")
    assert set(stored) == {*before, ".gitattributes"} == {*done.files, ".gitattributes"}
    assert all(stored[name] == before[name] for name in before if name != "README.md")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("org/protected", dtype=torch.bfloat16)), logits(plain)
    )
    decrypt_checkpoint("org/protected@main", tmp_path / "back", key=key)
    for path in tiny_llama.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_what_the_card_says_of_an_encrypted_model(hub: HubServer, encrypted: Path, key: Key) -> None:
    push(encrypted, "org/protected")
    card = hub.files("org/protected")["README.md"].decode()
    assert "<!-- qguard:encrypt begin -->" in card
    found = data(card)
    assert found["tags"] == ["quantization-protected", "qguard"]
    assert found["library_name"] == "transformers"
    assert "base_model" not in found  # it was a folder
    block = found["qguard"]
    assert (block["schema_version"], block["method"]) == (1, "encrypt")
    assert block["parameters"]["mode"] == "exact"
    assert block["parameters"]["traps"] == {
        "strength": 18,
        "fraction": 0.25,
        "qk_fraction": 0.75,
        "positive_only": False,
    }
    assert block["key_fingerprint"] == key.fingerprint
    assert block["verification"] == {"tensors": 21, "rewritten_exactly": 18, "restored_bit_exactly": 21}
    assert str(encrypted.parent) not in card
    ModelCard(card).validate()


def test_from_the_hub_to_the_hub(hub: HubServer, tiny_llama: Path, key: Key, tmp_path: Path) -> None:
    commit = hub.add_repository("org/plain", tiny_llama)
    encrypt_checkpoint("org/plain@main", tmp_path / "out", key=key)
    push(tmp_path / "out", "org/protected")
    found = data(hub.files("org/protected")["README.md"].decode())
    assert found["base_model"] == "org/plain"
    assert found["qguard"]["source"] == {"model": "org/plain", "revision": commit}


def test_a_protected_model_on_the_hub_is_known_to_be_one(
    hub: HubServer, encrypted: Path, tiny_llama: Path, key: Key
) -> None:
    """Its ``qguard.json`` is not among the files that transformers downloads."""
    push(encrypted, "org/protected")
    with pytest.raises(QGuardError, match="protected"):
        AutoModelForCausalLM.from_pretrained("org/protected", quantization_config=QGuardInt8Config())
    unlocked = QGuardUnlockConfig(BitsAndBytesConfig(load_in_8bit=True), key=key)
    found = AutoModelForCausalLM.from_pretrained("org/protected", quantization_config=unlocked)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert torch.equal(logits(found), logits(plain))


def test_guarded_from_the_hub(hub: HubServer, tiny_llama: Path) -> None:
    commit = hub.add_repository("org/plain", tiny_llama)
    hub.commit("org/plain", {"config.json": None})
    config = QGuardInt8Config()
    model = AutoModelForCausalLM.from_pretrained("org/plain", revision=commit, quantization_config=config)
    assert (model.qguard_report.model, model.qguard_report.revision) == ("org/plain", commit)
    model.push_to_hub("org/guarded")
    found = data(hub.files("org/guarded")["README.md"].decode())
    assert (found["base_model"], found["base_model_relation"]) == ("org/plain", "quantized")
    assert "_commit_hash" not in hub.files("org/guarded")["config.json"].decode()


def test_push_to_hub_of_a_guarded_model(hub: HubServer, guarded: Any) -> None:
    info = guarded.push_to_hub("org/guarded", private=True, commit_message="Mine", tags=["more"])
    assert info.oid == hub.head("org/guarded")
    assert hub.repository("org/guarded").private
    assert hub.repository("org/guarded").commits[info.oid].title == "Mine"
    stored = hub.files("org/guarded")
    assert GuardReport.model_validate_json(stored["qguard.json"]) == guarded.qguard_report
    card = stored["README.md"].decode()
    assert "## Guarded quantization" in card
    found = data(card)
    assert found["tags"] == ["quantization-guarded", "qguard", "more"]
    assert found["qguard"]["method"] == "guard"
    assert found["qguard"]["parameters"]["method"] == "auto"
    assert found["qguard"]["verification"]["weights"] == guarded.qguard_report.weights
    again = AutoModelForCausalLM.from_pretrained("org/guarded")
    assert torch.equal(logits(again), logits(guarded))


def test_save_pretrained_with_push_to_hub(hub: HubServer, guarded: Any, tmp_path: Path) -> None:
    guarded.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="alice/mine", commit_message="Both")
    assert hub.files("alice/mine")["qguard.json"] == (tmp_path / "mine/qguard.json").read_bytes()
    guarded.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert "## Guarded quantization" in hub.files("alice/named")["README.md"].decode()


THEIR_CARD = """---
# by hand
license: mit   # theirs
base_model: meta/llama
tags: [theirs]
qguard: {method: old}
model-index:
- name: theirs
  results:
  - task:
      type: text-generation
    dataset: {name: d, type: d}   # kept
    metrics:
    - type: accuracy
      value: 0.5
extra:
---
# Their model

Their words.
"""


def test_a_card_on_the_hub_is_kept(hub: HubServer, encrypted: Path, tmp_path: Path) -> None:
    hub.add_repository("org/model", {"README.md": THEIR_CARD.encode(), "notes.txt": b"theirs"})
    (tmp_path / "collapse.json").write_text(json.dumps(COLLAPSE))
    push(encrypted, "org/model", collapse=tmp_path / "collapse.json")
    card = hub.files("org/model")["README.md"].decode()
    for line in THEIR_CARD.splitlines():
        if line not in ("tags: [theirs]", "qguard: {method: old}"):
            assert f"{line}\n" in card
    found = data(card)
    assert found["tags"] == ["theirs", "quantization-protected", "qguard"]
    assert found["base_model"] == "meta/llama"
    assert found["qguard"]["method"] == "encrypt"
    assert hub.files("org/model")["notes.txt"] == b"theirs"
    results = found["model-index"][0]["results"]
    assert results[0]["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert [result["dataset"].get("config") for result in results] == [None, "full precision", "bnb-int8"]
    assert results[2]["metrics"] == [
        {"type": "perplexity", "value": 9e9, "name": "Perplexity", "args": {"original": 6.6}}
    ]
    assert found["qguard"]["collapse"] == {
        "full precision": "measured",
        "bnb-int8": "kl is NaN",
        "quanto-int4": "refused",
    }
    commit = hub.head("org/model")
    assert push(encrypted, "org/model", collapse=tmp_path / "collapse.json").commit == commit
    assert hub.files("org/model")["README.md"].decode() == card
    changed = json.loads(json.dumps(COLLAPSE).replace("9000000000.0", "7.0"))
    (tmp_path / "collapse.json").write_text(json.dumps(changed))
    push(encrypted, "org/model", collapse=tmp_path / "collapse.json")
    again = hub.files("org/model")["README.md"].decode()
    assert again == card.replace("9000000000.0", "7.0")


def test_results_in_a_new_card_are_those_of_the_clients_own_reader(
    hub: HubServer, encrypted: Path, tmp_path: Path
) -> None:
    (tmp_path / "collapse.json").write_text(json.dumps(COLLAPSE))
    push(encrypted, "org/model", collapse=tmp_path / "collapse.json")
    results = ModelCard.load("org/model").data.eval_results
    assert [(found.dataset_config, found.metric_type, found.metric_value) for found in results] == [
        ("full precision", "kl", 0.0),
        ("full precision", "perplexity", 6.5),
        ("bnb-int8", "perplexity", 9e9),
    ]
    assert results[0].source_name == "optimum-qguard"


def test_a_pull_request_by_somebody_else(hub: HubServer, encrypted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repository("org/model", {"README.md": b"# Theirs\n"})
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    done = push(encrypted, "org/model", create_pr=True)
    assert done.pull_request == 1
    assert done.url == f"{hub.url}/org/model/discussions/1"
    assert hub.files("org/model")["README.md"] == b"# Theirs\n"
    assert hub.files("org/model", "refs/pr/1")["README.md"].startswith(b"---\n")
    assert b"# Theirs\n" in hub.files("org/model", "refs/pr/1")["README.md"]
    assert "your token may not do that" in error_of(push, encrypted, "org/model")
    assert "not both" in error_of(push, encrypted, "org/model", create_pr=True, revision="v2")


def test_a_branch(hub: HubServer, encrypted: Path) -> None:
    hub.add_repository("org/model", {"README.md": b"# Main\n"})
    push(encrypted, "org/model", revision="v2")
    assert "qguard.json" not in hub.files("org/model")
    assert "qguard.json" in hub.files("org/model", "v2")
    push(encrypted, "org/new", revision="v2")
    assert "qguard.json" in hub.files("org/new", "v2")
    assert "qguard.json" not in hub.files("org/new")


def test_weights_that_a_loader_might_prefer_are_deleted(hub: HubServer, encrypted: Path) -> None:
    hub.add_repository(
        "org/model",
        {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "x.gguf": b"stays"},
    )
    done = push(encrypted, "org/model")
    assert done.deleted == ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    stored = hub.files("org/model")
    assert "x.gguf" in stored
    assert not set(done.deleted) & set(stored)


def test_what_is_not_uploaded(hub: HubServer, encrypted: Path, key: Key) -> None:
    (encrypted / ".hidden").write_text("secret")
    (encrypted / ".cache").mkdir()
    (encrypted / ".cache/x").write_text("secret")
    key.save(encrypted / "model.key")
    (encrypted / "cert.pem").write_text("secret")
    (encrypted / "optimizer.pt").write_bytes(b"pickle")
    (encrypted / "OTHER.PKL").write_bytes(b"pickle")
    done = push(encrypted, "org/model")
    assert done.left_out == ("OTHER.PKL", "cert.pem", "model.key", "optimizer.pt")
    assert not {".hidden", ".cache/x", *done.left_out} & set(hub.files("org/model"))
    (encrypted / "link.bin").symlink_to("/etc/hostname")
    done = push(encrypted, "org/model", include_pickles=True)
    assert hub.files("org/model")["optimizer.pt"] == b"pickle"
    assert done.left_out == ("cert.pem", "link.bin", "model.key")
    key.save(encrypted / "notes.txt")
    assert "notes.txt: holds a key" in error_of(push, encrypted, "org/other")
    assert "org/other" not in hub.store.repositories


def test_refused_before_anything_is_sent(hub: HubServer, encrypted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert "no such folder" in error_of(push, tmp_path / "none", "org/model")
    assert "has no qguard.json" in error_of(push, tiny_llama, "org/model")
    assert "no safetensors weights" in error_of(push, (tmp_path / "out/..").resolve(), "org/model")
    for name in ("a b", "a/b/c", "org/x@main", "", "../x"):
        assert "give one as org/name" in error_of(push, encrypted, name)
    (encrypted / "link").symlink_to("/etc/hostname")
    assert "leads out of the checkpoint's folder" in error_of(push, encrypted, "org/model")
    (encrypted / "link").unlink()
    (tmp_path / "c.json").write_text('{"rows": [{"format": 3}]}')
    assert "not what qguard collapse --json prints" in error_of(
        push, encrypted, "org/model", collapse=tmp_path / "c.json"
    )
    assert "cannot be read" in error_of(push, encrypted, "org/model", collapse=tmp_path / "none.json")
    weights = encrypted / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors is not what qguard.json says" in error_of(push, encrypted, "org/model")
    for damaged in ('{"tensors": [3]}', '{"kind": "encrypted", "mixed": []}', '{"tensors": 7}'):
        (encrypted / "qguard.json").write_text(damaged)
        assert "qguard.json: was changed or damaged" in error_of(push, encrypted, "org/model")
    (encrypted / "qguard.json").write_text("[]")
    assert "not a JSON object" in error_of(push, encrypted, "org/model")
    (encrypted / "qguard.json").write_text("[")
    assert "cannot be read as JSON" in error_of(push, encrypted, "org/model")
    assert not hub.requests


def test_refused_by_the_hub(hub: HubServer, encrypted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "your token may not do that" in error_of(push, encrypted, "others/model")
    hub.add_repository("org/public")
    assert "is public; make it private in its settings" in error_of(push, encrypted, "org/public", private=True)
    card = encrypted / "README.md"
    text = card.read_text()
    card.write_text(text.replace("---\n", "---\nbase_model: not a model\n", 1))
    refused = 'the Hub refuses its metadata: "base_model" with value'
    assert refused in error_of(push, encrypted, "org/model")
    card.write_text(text.replace("---\n", "---\na: [\n", 1))
    assert "YAML header is broken" in error_of(push, encrypted, "org/model")
    card.write_bytes(b"\xff")
    assert "not UTF-8" in error_of(push, encrypted, "org/model")
    card.write_text(text)
    assert "org/model" not in hub.store.repositories  # nothing was begun
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is not valid" in error_of(push, encrypted, "org/model")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token to upload with; set HF_TOKEN" in error_of(push, encrypted, "org/model")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in error_of(push, encrypted, "org/model")


def test_somebody_else_was_faster(hub: HubServer, encrypted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repository("org/model", {"README.md": b"# Old\n"})
    preupload = HfApi.preupload_lfs_files

    def meanwhile(self: HfApi, *arguments: Any, **options: Any) -> None:
        hub.commit("org/model", {"README.md": b"# New\n"})
        preupload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    assert "was changed by somebody" in error_of(push, encrypted, "org/model")
    assert hub.files("org/model")["README.md"] == b"# New\n"


def test_a_server_that_stumbles(hub: HubServer, encrypted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("PUT /lfs/", status=503)
    hub.fail("POST .*/preupload/", status=429, headers={"Retry-After": "0"})
    done: Published = push(encrypted, "org/model")
    assert hub.head("org/model") == done.commit
    hub.fail("POST .*/commit/", status=403, headers={"X-Error-Message": "quota"}, times=9)
    (encrypted / "new.txt").write_text("x")
    assert "your token may not do that (quota)" in error_of(push, encrypted, "org/model")


def test_a_download_that_is_cut_is_taken_up(hub: HubServer, tiny_llama: Path, key: Key, tmp_path: Path) -> None:
    hub.add_repository("org/plain", tiny_llama)
    hub.fail("GET /cdn/", cut_after=100_000, times=2)
    encrypt_checkpoint("org/plain@main", tmp_path / "out", key=key)
    found = Path(snapshot_download("org/plain")) / "model.safetensors"
    assert found.read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
