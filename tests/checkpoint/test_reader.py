from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_qguard.checkpoint import CheckpointError, open_checkpoint
from optimum_qguard.checkpoint.repository import open_repository
from optimum_qguard.encrypt.key import Key
from tests.checkpoint.conftest import Tensors

Write = Callable[..., Path]


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_safetensors_wrote(write: Write, tensors: Tensors, shards: int) -> None:
    reader = open_checkpoint(write(shards))
    assert len(reader.shards) == shards
    assert {name: (info.dtype, info.shape) for name, info in reader.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    read = dict(reader.items())
    assert list(read) == list(reader.tensors)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name].float(), tensor.float())
        assert reader.tensors[name].n_bytes == tensor.nbytes
        assert reader.tensors[name].n_elements == tensor.numel()


def test_config_and_other_files(write: Write) -> None:
    folder = write(2)
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "owner.key", ".gitattributes"):
        (folder / name).write_bytes(b"x")
    for name in ("rust_model.ot", "weights.npz", "PYTORCH_MODEL.BIN", "Server.PEM"):
        (folder / name).write_bytes(b"x")
    Key.generate().save(folder / "notes.json")
    (folder / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    reader = open_checkpoint(folder)
    assert reader.config == {"model_type": "llama"}
    assert reader.quantization_config is None
    assert set(reader.other_files) == {
        PurePosixPath(name)
        for name in ("config.json", "tokenizer.json", "README.md", "additional_chat_templates/tool.jinja")
    }


def test_the_index_keeps_its_line_ends(write: Write) -> None:
    folder = write(2)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    index = open_checkpoint(folder).index
    assert index is not None
    assert index.encode() == path.read_bytes()


def test_already_quantized_is_told(write: Write) -> None:
    reader = open_checkpoint(write(config={"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert reader.quantization_config == {"quant_method": "gptq", "bits": 4}


def test_single_file(write: Write, tensors: Tensors) -> None:
    reader = open_checkpoint(write() / "model.safetensors")
    assert reader.tensors.keys() == tensors.keys()
    assert reader.config == {}
    assert reader.other_files == ()


def test_writing_into_a_tensor_leaves_the_file_alone(write: Write) -> None:
    folder = write()
    before = (folder / "model.safetensors").read_bytes()
    reader = open_checkpoint(folder)
    reader.read("layers.0.weight").add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(reader.read("layers.0.weight"), load_file(folder / "model.safetensors")["layers.0.weight"])


def test_pages_of_read_tensors_are_given_back(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def mapped() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssFile"))

    save_file({f"t{n}": torch.ones(4, 1024, 1024) for n in range(8)}, tmp_path / "model.safetensors")
    before = mapped()
    most = 0
    for name, tensor in open_checkpoint(tmp_path).items():
        assert tensor.sum() == tensor.numel(), name
        most = max(most, mapped() - before)
    one = 16 * 1024
    assert one // 2 < most < 3 * one


def error_of(model: str | Path, opens: Callable[[str | Path], object] = open_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        opens(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_such_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none" / "x").endswith("none/x: no such folder or file")
    assert "no such folder" in error_of("./none")
    assert "name is empty" in error_of("")
    assert "name is empty" in error_of("", open_repository)
    for opens in (open_checkpoint, open_repository):
        assert error_of("a" * 300, opens).endswith(
            ": cannot be looked for (File name too long); name a folder or a repository"
        )
        assert "no-such-user/x: cannot be looked for (" in error_of("~no-such-user/x", opens)


def test_a_folder_has_no_revisions(write: Write) -> None:
    folder = write()
    for opens in (open_checkpoint, open_repository):
        with pytest.raises(CheckpointError, match="where there is no revision v2; leave that out"):
            opens(folder, revision="v2")


def test_no_weights(tmp_path: Path) -> None:
    assert "no safetensors weights" in error_of(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        message = error_of(path)
        assert "pytorch_model.bin is a pickle" in message
        assert "save_pretrained" in message


def test_weights_under_another_name(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    assert "to open adapter.safetensors, give the path of that file" in error_of(folder)


def test_missing_shard(write: Write) -> None:
    folder = write(3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = error_of(folder)
    assert "model-00002-of-00003.safetensors: missing" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:50],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        lambda content: b"\xff" * 8 + content[8:],
    ],
    ids=["last-byte", "header", "empty", "trailing", "lfs-pointer", "length"],
)
def test_damaged_shard(write: Write, damage: Callable[[bytes], bytes]) -> None:
    shard = write(3) / "model-00002-of-00003.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    assert error_of(shard.parent).startswith(f"{shard}: not a complete safetensors file")


def edit_index(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", ".."],
)
def test_index_that_leaves_the_folder(write: Write, shard: str) -> None:
    folder = write(3)
    edit_index(folder, step=shard)
    assert f"names {shard!r}" in error_of(folder)


def test_link_that_leaves_the_folder(write: Write, tmp_path: Path) -> None:
    folder = write()
    outside = tmp_path / "secret.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert "leads out of the checkpoint's folder" in error_of(folder)


def test_other_file_that_leaves_the_folder(write: Write, tmp_path: Path) -> None:
    folder = write()
    (tmp_path / "id_rsa").write_text("private")
    (folder / "NOTICE.txt").symlink_to(tmp_path / "id_rsa")
    assert "NOTICE.txt: leads out of the checkpoint's folder" in error_of(folder)


def test_links_within_the_hub_cache(write: Write, tmp_path: Path, tensors: Tensors) -> None:
    folder = write(name="models--a--b/snapshots/0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(file for file in folder.iterdir() if file.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    reader = open_checkpoint(folder)
    assert reader.tensors.keys() == tensors.keys()
    assert PurePosixPath("README.md") in reader.other_files
    assert len(open_checkpoint(folder / "model.safetensors")) == len(tensors)


def test_tensor_absent_from_its_shard(write: Write) -> None:
    folder = write(3)
    edit_index(folder, ghost="model-00003-of-00003.safetensors")
    assert "tensor ghost is not in it" in error_of(folder)


def test_tensor_in_two_shards(write: Write) -> None:
    folder = write(2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00003-of-00002.safetensors")
    edit_index(folder, step="model-00003-of-00002.safetensors")
    assert "is both in" in error_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}"])
def test_malformed_index(write: Write, content: str) -> None:
    folder = write(2)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in error_of(folder)


def test_malformed_config(write: Write) -> None:
    folder = write()
    (folder / "config.json").write_bytes(b"\xff{")
    assert "config.json: cannot be read as JSON" in error_of(folder)


def test_hub_repository_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "org/no-such-model@v1: no such folder, and the Hub's repository" in error_of("org/no-such-model@v1")


def test_one_revision_only() -> None:
    with pytest.raises(CheckpointError, match="give one"):
        open_checkpoint("org/model@v1", revision="v2")


def test_an_adapter_without_its_model(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds an adapter .* merge it into its model"):
        open_checkpoint(folder)
