"""A checkpoint goes in, comes out encrypted, computes the same, and comes back byte for byte."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint import output as output_module
from optimum_qguard.encrypt.errors import ArchitectureError, EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.manifest import EncryptReport
from optimum_qguard.encrypt.transform import decrypt_checkpoint, encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps

KEY = Key(bytes(range(32)))
IDS = torch.arange(24).view(2, 12) * 17 % 512


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in several files, with a model card."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto").save_pretrained(folder, max_shard_size="200KB")
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\r\n# A model\r\n")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_there_and_back(sharded: Path, tmp_path: Path, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    report = encrypt_checkpoint(
        sharded, tmp_path / "out", key=KEY, workers=workers, progress=lambda *done: seen.append(done)
    )
    before, encrypted = files(sharded), files(tmp_path / "out")
    assert encrypted.keys() == before.keys() | {"qguard.json"}
    changed = {name for name in before if before[name] != encrypted[name]}
    assert "README.md" in changed
    assert changed - {"README.md"} < report.files.keys()  # the embeddings' file stays
    assert len(seen) == len(report.tensors)
    assert seen[-1][0] == seen[-1][1]
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(logits(sharded, dtype), logits(tmp_path / "out", dtype))
    decrypt_checkpoint(tmp_path / "out", tmp_path / "back", key=KEY, workers=workers)
    assert files(tmp_path / "back") == before


def test_the_manifest_says_what_was_done(sharded: Path, tmp_path: Path) -> None:
    report = encrypt_checkpoint(sharded, tmp_path / "out", key=KEY, traps=Traps(strength=5))
    assert EncryptReport.model_validate_json((tmp_path / "out" / "qguard.json").read_text()) == report
    assert report.key_fingerprint == KEY.fingerprint
    assert KEY.secret.hex() not in (tmp_path / "out" / "qguard.json").read_text()
    assert report.sites == {"norm": 4, "value": 2, "up": 2, "key": 2}
    assert report.traps.strength == 5
    for name, digest in report.files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    tensors = {name: tensor for file in report.files for name, tensor in load_file(sharded / file).items()}
    assert report.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        content: Any = tensor.flatten().view(torch.uint8).numpy()
        assert blake3(content.tobytes()).hexdigest() == report.tensors[name]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Protected against quantization" in card
    assert "- quantization-protected" in card


def test_a_manifest_from_before_queries_and_keys_had_a_fraction_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encrypt_checkpoint(tiny_llama, out, key=KEY, traps=Traps(fraction=0.3, qk_fraction=0.3))
    manifest = json.loads((out / "qguard.json").read_text())
    del manifest["traps"]["qk_fraction"]
    (out / "qguard.json").write_text(json.dumps(manifest))
    decrypt_checkpoint(out, tmp_path / "back", key=KEY)
    assert files(tmp_path / "back") == files(tiny_llama)


def test_encrypted_twice(tiny_llama: Path, tmp_path: Path) -> None:
    second = Key.generate()
    encrypt_checkpoint(tiny_llama, tmp_path / "once", key=KEY)
    encrypt_checkpoint(tmp_path / "once", tmp_path / "twice", key=second)
    assert torch.equal(logits(tiny_llama, torch.bfloat16), logits(tmp_path / "twice", torch.bfloat16))
    with pytest.raises(EncryptError, match="another key"):
        decrypt_checkpoint(tmp_path / "twice", tmp_path / "no", key=KEY)
    decrypt_checkpoint(tmp_path / "twice", tmp_path / "first", key=second)
    assert files(tmp_path / "first") == files(tmp_path / "once")
    decrypt_checkpoint(tmp_path / "first", tmp_path / "plain", key=KEY)
    assert files(tmp_path / "plain") == files(tiny_llama)


def test_wrong_key_and_foreign_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    with pytest.raises(EncryptError, match="another key"):
        decrypt_checkpoint(out, tmp_path / "no", key=Key.generate())
    with pytest.raises(EncryptError, match="no encrypted checkpoint"):
        decrypt_checkpoint(tiny_llama, tmp_path / "no", key=KEY)
    manifest = json.loads((out / "qguard.json").read_text())
    for change, message in [
        ({"schema_version": 2}, "schema version 2; update"),
        ({"key_fingerprint": "x"}, "changed or damaged .key_fingerprint"),
        ({"tensors": {"other": ""}}, "not the checkpoint that was encrypted"),
    ]:
        (out / "qguard.json").write_text(json.dumps(manifest | change))
        with pytest.raises(EncryptError, match=message):
            decrypt_checkpoint(out, tmp_path / "no", key=KEY)
    (out / "qguard.json").write_text("{")
    with pytest.raises(EncryptError, match="cannot be read as JSON"):
        decrypt_checkpoint(out, tmp_path / "no", key=KEY)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_tampered_weights(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    tensors = load_file(out / "model.safetensors")
    tensors[name][0, 0] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncryptError, match=f"{name} is not the tensor"):
        decrypt_checkpoint(out, tmp_path / "no", key=KEY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_tampered_dtypes(tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name].clamp(-1, 1).to(dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncryptError, match=f"{name} is not the tensor"):
        decrypt_checkpoint(out, tmp_path / "no", key=KEY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_manifest_with_half_a_character(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    content = json.loads((out / "qguard.json").read_text()) | {"previous_card": "\ud800"}
    (out / "qguard.json").write_text(json.dumps(content))
    with pytest.raises(EncryptError, match=r"qguard\.json: cannot be read as JSON"):
        decrypt_checkpoint(out, tmp_path / "no", key=KEY)


def test_inexact_weights_name_the_largest_safe_strength(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(folder)
    with pytest.raises(EncryptError, match=r"model\.layers\.\S+: the weight \S+ at .* exactly in float16; .*float32"):
        encrypt_checkpoint(folder, tmp_path / "out", key=KEY)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_encrypted(tiny_llama: Path, tmp_path: Path) -> None:
    def altered(config: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_llama, folder)
        found = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(found))
        state = {**load_file(folder / "model.safetensors"), **tensors}
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    name = "model.layers.0.mlp.up_proj.weight"
    adapter = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}
    for config, tensors, message in [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "quantized already .gptq."),
        ({}, adapter, "LoRA adapter; merge it"),
        ({}, {name: torch.zeros(256, 128).to(torch.float8_e4m3fn)}, "up_proj.weight: is float8_e4m3fn"),
        ({}, {name: torch.zeros(256, 128).to(torch.int8)}, "up_proj.weight: is int8, so the model is quantized"),
        ({}, {name: torch.zeros(256, 128).to(torch.int32)}, "up_proj.weight: is int32, so the model is quantized"),
        ({"model_type": "bert"}, {}, "model of type 'bert'.*known: .*llama"),
        ({}, {name: None}, "up_proj"),
        ({}, {"model.layers.0.surprise.weight": torch.zeros(2)}, "surprise.weight is not known"),
    ]:
        with pytest.raises((EncryptError, ArchitectureError), match=message):
            encrypt_checkpoint(altered(config, tensors), tmp_path / "out", key=KEY)
    with pytest.raises(CheckpointError, match="is the input's folder"):
        encrypt_checkpoint(tiny_llama, tiny_llama, key=KEY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        encrypt_checkpoint(tiny_llama, tmp_path / "full", key=KEY)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"(?i)no space left"):
        encrypt_checkpoint(tiny_llama, tmp_path / "out", key=KEY)
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_flushed_once_before_it_gets_its_name(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: Counter[int] = Counter()
    fsync = os.fsync

    def count(descriptor: int) -> None:
        assert not (tmp_path / "out").exists()
        flushed[os.fstat(descriptor).st_ino] += 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    encrypt_checkpoint(sharded, tmp_path / "out", key=KEY)
    written = {path.name: flushed[path.stat().st_ino] for path in (tmp_path / "out").iterdir()}
    assert min(written.values()) >= 1
    assert {times for name, times in written.items() if name.endswith(".safetensors")} == {1}


def test_killed_half_way_and_run_again(sharded: Path, tmp_path: Path) -> None:
    """What a killed run leaves behind has no final name, and does not disturb the next run."""
    script = f"""
import time
from optimum_qguard.encrypt import transform
from optimum_qguard.encrypt.key import Key
def wait(done, total):
    print(done, flush=True)
    time.sleep(0.2 if done < total / 2 else 60)
transform.encrypt_checkpoint({str(sharded)!r}, {str(tmp_path / "out")!r}, key=Key(bytes(range(32))), progress=wait)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    encrypt_checkpoint(sharded, tmp_path / "out", key=KEY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sharded"]
    decrypt_checkpoint(tmp_path / "out", tmp_path / "back", key=KEY)
    assert files(tmp_path / "back") == files(sharded)


def test_two_runs_into_one_folder(tiny_llama: Path, tmp_path: Path) -> None:
    """The second is refused; the first goes on."""
    refused: list[str] = []

    def run_another(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="another run is writing to it") as caught:
                encrypt_checkpoint(tiny_llama, tmp_path / "out", key=Key.generate())
            refused.append(str(caught.value))

    encrypt_checkpoint(tiny_llama, tmp_path / "out", key=KEY, progress=run_another)
    assert refused
    decrypt_checkpoint(tmp_path / "out", tmp_path / "back", key=KEY)
    assert files(tmp_path / "back") == files(tiny_llama)


def test_tampered_so_that_it_cannot_even_be_divided(tiny_llama: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    tensors = load_file(out / "model.safetensors")
    tensors[name].fill_(torch.finfo(torch.bfloat16).smallest_normal)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncryptError, match=f"{name} is not the tensor"):
        decrypt_checkpoint(out, tmp_path / "no", key=KEY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
