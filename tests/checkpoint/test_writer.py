from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_qguard.checkpoint import CheckpointError, TensorInfo, open_checkpoint, transform_checkpoint

Write = Callable[..., Path]


def identity(name: str, tensor: Tensor) -> Tensor:
    return tensor


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
def test_identity_is_byte_identical(write: Write, tmp_path: Path, shards: int) -> None:
    folder = write(shards)
    seen: list[TensorInfo] = []
    transform_checkpoint(open_checkpoint(folder), tmp_path / "a" / "out", identity, progress=seen.append)
    assert contents(tmp_path / "a" / "out") == contents(folder)
    assert [info.name for info in seen] == list(open_checkpoint(folder).tensors)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e5m2]


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name.isprintable() and name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_identity_is_byte_identical_for_any_file(
    tmp_path: Path, shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir(exist_ok=True)
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    transform_checkpoint(open_checkpoint(folder), out, identity, overwrite=True)
    assert contents(out) == contents(folder)


def test_the_function_is_applied(write: Write, tmp_path: Path) -> None:
    folder = write(2)
    transform_checkpoint(
        open_checkpoint(folder), tmp_path / "out", lambda name, tensor: tensor * 2 if name == "experts" else tensor
    )
    for shard in open_checkpoint(folder).shards:
        before, after = load_file(folder / shard), load_file(tmp_path / "out" / shard)
        for name in before:
            factor = 2 if name == "experts" else 1
            assert torch.equal(after[name].float(), before[name].float() * factor)
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_views_are_written_as_they_look(write: Write, tmp_path: Path) -> None:
    views = {
        "layers.0.weight": lambda tensor: tensor.T,
        "layers.0.bias": lambda tensor: tensor.repeat_interleave(2)[::2],
    }
    folder = write()
    transform_checkpoint(
        open_checkpoint(folder), tmp_path / "out", lambda name, tensor: views.get(name, lambda same: same)(tensor)
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name, view in views.items():
        assert torch.equal(after[name], view(before[name]))


def test_transformers_reads_the_output(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in", max_shard_size="5KB")
    reader = open_checkpoint(tmp_path / "in")
    assert len(reader.shards) > 1
    transform_checkpoint(reader, tmp_path / "out", identity)
    tokens = torch.arange(8)[None]
    logits = [LlamaForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("in", "out")]
    assert torch.equal(*logits)


def refused(folder: Path, out: Path, match: str, **options: bool) -> None:
    before = contents(out) if out.is_dir() else None
    with pytest.raises(CheckpointError, match=match):
        transform_checkpoint(open_checkpoint(folder), out, identity, **options)
    assert (contents(out) if out.is_dir() else None) == before


def test_output_that_is_taken(write: Write, tmp_path: Path) -> None:
    folder = write()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused(folder, tmp_path / "out", "not empty")
    (tmp_path / "file").write_text("x")
    refused(folder, tmp_path / "file", "is a file")
    assert (tmp_path / "file").read_text() == "x"


def test_output_that_is_the_input(write: Write, tmp_path: Path) -> None:
    folder = write()
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", folder / ".." / "in", folder / "sub"):
        refused(folder, out, "is the input's folder", overwrite=True)


def test_overwrite_leaves_no_weights_of_the_old_checkpoint(write: Write, tmp_path: Path) -> None:
    single, sharded = write(1, "single"), write(3, "sharded")
    out = tmp_path / "out"
    transform_checkpoint(open_checkpoint(single), out, identity)
    (out / "mine.txt").write_text("keep")
    (out / "pytorch_model.bin").write_bytes(b"old")
    transform_checkpoint(open_checkpoint(sharded), out, identity, overwrite=True)
    assert contents(out) == contents(sharded) | {"mine.txt": b"keep"}


@pytest.mark.parametrize("existed", [False, True])
def test_nothing_is_left_when_the_function_fails(write: Write, tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def fail_late(name: str, tensor: Tensor) -> Tensor:
        if name == list(reader.tensors)[-1]:
            raise RuntimeError("late")
        return tensor

    reader = open_checkpoint(write(3))
    with pytest.raises(RuntimeError, match="late"):
        transform_checkpoint(reader, out, fail_late)
    assert out.exists() == existed
    assert not existed or list(out.iterdir()) == []


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:1]], ids=["dtype", "shape"])
def test_dtype_and_shape_are_kept(write: Write, tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"experts: was torch.float32 \(2, 3, 4\) and became"):
        transform_checkpoint(
            open_checkpoint(write()), tmp_path / "out", lambda name, t: change(t) if name == "experts" else t
        )
    assert not (tmp_path / "out").exists()


def test_a_killed_run_can_be_run_again(write: Write, tmp_path: Path) -> None:
    folder = write(2)
    script = textwrap.dedent("""
        import os, sys
        from optimum_qguard.checkpoint import open_checkpoint, transform_checkpoint

        def die(name, tensor):
            if name == list(reader.tensors)[-1]:
                os._exit(9)
            return tensor

        reader = open_checkpoint(sys.argv[1])
        transform_checkpoint(reader, sys.argv[2], die)
    """)
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", script, str(folder), str(out)], check=False).returncode == 9
    assert not out.exists()
    assert (tmp_path / ".out.partial").exists()
    transform_checkpoint(open_checkpoint(folder), out, identity)
    assert contents(out) == contents(folder)
    assert not (tmp_path / ".out.partial").exists()


def test_no_space_is_seen_beforehand(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write()
    needed = sum(len(content) for content in contents(folder).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    refused(folder, tmp_path / "out", "no space: .* GB to write")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    transform_checkpoint(open_checkpoint(folder), tmp_path / "out", identity)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    # The limit on the size of files fails a write as a full disk does, with another number.
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    save_file({f"t{n}": torch.ones(1 << 16) for n in range(4)}, folder / "model.safetensors")
    reader = open_checkpoint(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written: File too large"):
            transform_checkpoint(reader, out, identity)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs user namespaces to mount a small disk")
    folder, out = tmp_path / "in", tmp_path / "disk" / "out"
    folder.mkdir()
    out.parent.mkdir()
    save_file({f"t{n}": torch.ones(1 << 16) for n in range(3)}, folder / "model.safetensors")
    script = textwrap.dedent("""
        import json, subprocess, sys
        from pathlib import Path
        from optimum_qguard.checkpoint import CheckpointError, open_checkpoint, transform_checkpoint

        folder, out = map(Path, sys.argv[1:])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", out.parent], check=True)

        def fill(name, tensor):
            if not (out.parent / "filler").exists():
                (out.parent / "filler").write_bytes(bytes(1 << 19))
            return tensor

        try:
            transform_checkpoint(open_checkpoint(folder), out, fill)
        except CheckpointError as error:
            print(json.dumps([str(error), [path.name for path in out.parent.iterdir()]]))
    """)
    done = subprocess.run(
        [*unshare, sys.executable, "-c", script, str(folder), str(out)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    message, left = json.loads(done.stdout)
    assert message == f"{out}: no space left on the disk; free some, or name a folder on another disk"
    assert left == ["filler"]
