from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from optimum_qguard import scan
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.scan.checks.numbers import Extent, extent
from optimum_qguard.scan.checks.pickle_worker import MEMORY
from optimum_qguard.scan.checks.pickles import check_pickles
from optimum_qguard.scan.detectors import get_detector
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.subject import read_subject
from tests.scan.malformed import INDEX, MODEL, SHARD, edit_index, sharded, sound, tensors, write_index
from tests.scan.remote import Remote


def scanned(folder: Path) -> ScanReport:
    report = scan(folder, detectors=["integrity"])
    assert not [run for run in report.detectors if run.state == "failed"], report.detectors
    return report


def only(folder: Path) -> Finding:
    (finding,) = scanned(folder).findings
    return finding


def test_missing_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a")
    (folder / SHARD.format(2)).unlink()
    finding = only(folder)
    assert (finding.severity, finding.file) == ("error", INDEX)
    assert SHARD.format(2) in finding.message
    (folder / INDEX).unlink()
    assert {(f.severity, f.message) for f in scanned(folder).findings} == {
        ("error", f"Files of a checkpoint in 2 parts are missing: {SHARD.format(2)}."),
        ("note", f"No index names these parts of a checkpoint: {SHARD.format(1)}."),
    }


def test_one_shard_on_its_own_is_what_was_asked_for(tmp_path: Path) -> None:
    assert scanned(sharded(tmp_path / "a") / SHARD.format(1)).findings == []


def test_index_against_headers(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path / "a"), ghost=SHARD.format(1))
    finding = only(tmp_path / "a")
    assert finding.severity == "error"
    assert "ghost" in finding.message

    folder = sharded(tmp_path / "b")
    index = json.loads((folder / INDEX).read_text())
    hidden = next(iter(index["weight_map"]))
    del index["weight_map"][hidden]
    (folder / INDEX).write_text(json.dumps(index))
    finding = only(folder)
    assert finding.severity == "note"
    assert hidden in finding.message

    folder = sharded(tmp_path / "c")
    index = json.loads((folder / INDEX).read_text())
    write_index(folder, index["weight_map"], float(6 * 32 * 32 * 4))
    assert scanned(folder).findings == []
    write_index(folder, index["weight_map"], 7)
    finding = only(folder)
    assert (finding.severity, finding.message) == (
        "note",
        f"{INDEX} says that the tensors have 7 bytes together; they have {6 * 32 * 32 * 4:,}.",
    )


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a")
    save_file(tensors(1), folder / SHARD.format(2))
    assert any("are in several files" in f.message for f in scanned(folder).findings if f.severity == "error")


def test_index_in_a_subfolder(tmp_path: Path) -> None:
    sharded(tmp_path / "a" / "unet")
    assert scanned(tmp_path / "a").verdict == "clean"
    (tmp_path / "a" / "unet" / SHARD.format(1)).unlink()
    assert f"unet/{SHARD.format(1)}" in only(tmp_path / "a").message


def test_links(tmp_path: Path) -> None:
    sound(tmp_path / "outside")
    folder = sound(tmp_path / "a")
    (folder / "copy.safetensors").symlink_to(MODEL)
    (folder / "inner").mkdir()
    (folder / "again").symlink_to("inner")
    assert not any(finding.unsettled for finding in scanned(folder).findings)
    (folder / "more").symlink_to(tmp_path / "outside")
    (folder / "passwd").symlink_to("/etc/passwd")
    found = [finding for finding in scanned(folder).findings if finding.unsettled]
    assert {finding.file for finding in found} == {"more", "passwd"}
    assert scanned(folder).verdict == "inconclusive"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_extent(dtype: torch.dtype) -> None:
    rows = torch.randn(8, 32).to(dtype)
    assert extent(rows) == Extent(0, float(rows.min()), float(rows.max()))
    rows[2, 3], rows[7, 31], rows[0, 0] = float("nan"), float("inf"), float("-inf")
    assert extent(rows) == Extent(3, 0.0, 0.0)
    assert extent(torch.zeros(4, 4, dtype=dtype)) == Extent(0, 0.0, 0.0)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weight = torch.randn(32, 32)
    weight[3, 5] = float("nan")
    finding = only(sound(tmp_path / "a", **{"model.layers.2.mlp.up_proj.weight": weight}))
    assert (finding.severity, finding.tensor, finding.value) == ("error", "model.layers.2.mlp.up_proj.weight", 1)


def test_zeros_and_copies_are_notes(tmp_path: Path) -> None:
    weight = torch.randn(32, 32)
    more = {f"model.layers.{layer}.mlp.gate_proj.weight": weight for layer in (3, 4)}
    more = {name: weight.clone() for name in more}
    more |= {f"model.layers.{layer}.norm.weight": torch.ones(512) for layer in (3, 4)}
    more["model.layers.5.bias"] = torch.zeros(32)
    report = scanned(sound(tmp_path / "a", **more))
    assert report.verdict == "clean"
    zeros, copies = sorted(report.findings, key=lambda finding: finding.message, reverse=True)[::-1]
    assert "hold nothing but zeros, as far as was looked: model.layers.5.bias." in zeros.message
    assert "layers.3.mlp.gate_proj.weight, model.layers.4.mlp.gate_proj.weight." in copies.message


def test_nearly_the_same_is_not_the_same(tmp_path: Path) -> None:
    weight = torch.randn(64, 1024)
    other = weight.clone()
    other[6] += 1  # not in the middle, which is compared first
    more = {"model.layers.3.up.weight": weight, "model.layers.4.up.weight": other}
    assert scanned(sound(tmp_path / "a", **more)).findings == []


def test_config_against_weights(tmp_path: Path) -> None:
    assert "says that the weights are bfloat16" in only(sound(tmp_path / "a", {"dtype": "bfloat16"})).message
    finding = only(sound(tmp_path / "b", {"vocab_size": 65}))
    assert finding.message == "config.json says that the embedding is 65 by 32; it is 64 by 32."
    assert scanned(sound(tmp_path / "c", {"vocab_size": None, "dtype": 5, "text_config": []})).findings == []


def test_quantization_that_is_not_there(tmp_path: Path) -> None:
    finding = only(sound(tmp_path / "a", {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert finding.severity == "warning"
    assert "loading it quantizes it" in finding.message
    for declared in ({"quant_method": "bitnet"}, {"quant_method": ["x"]}, "gptq", [1]):
        assert only(sound(tmp_path / "b", {"quantization_config": declared})).severity == "note"
    quantized = {"model.layers.2.q.weight": torch.ones(8, 8, dtype=torch.int8)}
    assert "look quantized" in scanned(sound(tmp_path / "c", **quantized)).findings[1].message


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8), (2, 2, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_quantized_already_are_not_called_clean(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Norms and embeddings beside them seldom are."""
    quantized = {"model.layers.2.q.weight": torch.ones(shape).to(dtype)}
    folder = sound(tmp_path / "a", {"quantization_config": {"quant_method": "gptq"}}, **quantized)
    for path in (folder, folder / "model.safetensors"):
        report = scanned(path)
        assert (report.verdict, report.complete) == ("inconclusive", False)
        assert report.reason.endswith("quantized already, so they were not looked at: model.layers.2.q.weight.")


def test_buffers_are_no_quantized_weights(tmp_path: Path) -> None:
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "embeddings.position_ids": torch.arange(8)[None],
        "model.layers.0.mask": torch.ones(8, 8, dtype=torch.bool),
        "model.layers.0.count": torch.ones(4, dtype=torch.int32),
        "model.layers.0.none": torch.ones(0, 4, dtype=torch.int8),
    }
    assert scanned(sound(tmp_path / "a", **buffers)).verdict == "clean"


def test_code(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a", {"auto_map": {"AutoModel": "modeling.Model"}})
    (folder / "modeling.py").write_text("import os")
    finding = only(folder)
    assert (finding.severity, finding.unsettled) == ("note", False)
    assert "modeling.py, auto_map in config.json" in finding.message


def test_other_formats_are_unsettled_only_alone(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a")
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert not only(folder).unsettled
    (folder / MODEL).unlink()
    assert only(folder).unsettled
    assert scanned(folder).verdict == "inconclusive"


def test_harmless_pickles(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    folder = sound(tmp_path / "a")
    torch.save(tensors(), folder / "pytorch_model.bin")
    torch.save(tensors(), folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(TrainingArguments(output_dir=str(tmp_path / "x")), folder / "training_args.bin")
    (folder / "numbers.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    report = scanned(folder)
    assert report.verdict == "clean"
    (finding,) = report.findings
    assert (finding.severity, finding.unsettled) == ("note", False)
    assert finding.message.startswith("picklescan finds nothing dangerous in the pickles")


def test_dangerous_pickles(tmp_path: Path) -> None:
    from tests.scan.malformed import Exploit

    folder = sound(tmp_path / "a")
    torch.save({"a": Exploit()}, folder / "model.ckpt")
    finding = only(folder)
    assert (finding.severity, finding.file) == ("error", "model.ckpt")
    assert "posix.system" in finding.message
    assert scanned(folder).verdict == "suspicious"


def test_pickles_that_cannot_be_read_leave_it_open(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a")
    (folder / "unknown.pkl").write_bytes(pickle.dumps(Path("x")))
    assert "imports that picklescan does not know: pathlib.PosixPath" in only(folder).message
    names = b"".join(b"caccelerate\nname%d\n0" % number for number in range(200))
    (folder / "unknown.pkl").write_bytes(names + b"N.")
    assert "accelerate.name0, accelerate.name1" in only(folder).message
    for content in (b"", b"\x80\x04", pickle.dumps({"a": 1})[:-1], b"7z\xbc\xaf\x27\x1c" + bytes(100), bytes(1000)):
        (folder / "unknown.pkl").write_bytes(content)
        finding = only(folder)
        assert (finding.severity, finding.unsettled, finding.file) == ("note", True, "unknown.pkl"), content
    with zipfile.ZipFile(folder / "unknown.pkl", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1})[:-1])
    assert only(folder).unsettled


READ_PICKLES = """
import resource, sys
from optimum_qguard.checkpoint.repository import open_repository
from optimum_qguard.scan.checks.pickles import check_pickles
from optimum_qguard.scan.subject import read_subject

(finding,) = check_pickles(read_subject(open_repository(sys.argv[1])))
print(finding.unsettled, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a")
    archive = zipfile.ZipFile(folder / "bomb.pkl", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("data.pkl", "w", force_zip64=True) as stream:
        stream.write(b"\x80\x04\x8e" + (3 << 30).to_bytes(8, "little"))  # a string of 3 GB
        for _ in range(1500):
            stream.write(bytes(1 << 20))
    # In a process of its own, whose only child is the one that reads the pickle.
    run = [sys.executable, "-c", READ_PICKLES, str(folder)]
    unsettled, peak = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert unsettled == "True"
    assert int(peak) * (1 if sys.platform == "darwin" else 1024) < MEMORY


def test_without_picklescan_pickles_leave_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sound(tmp_path / "a")
    (folder / "numbers.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    assert not only(folder).unsettled
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert only(folder).unsettled
    assert "install picklescan" in only(folder).message


def test_remote_pickles_are_read_up_to_a_limit(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a")
    (folder / "a.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    (finding,) = check_pickles(read_subject(Remote(folder)))
    assert not finding.unsettled
    repository = Remote(folder, {"a.pkl": 65 << 20})
    subject = read_subject(repository)
    before = repository.bytes_read
    (finding,) = check_pickles(subject)
    assert finding.unsettled
    assert "download the repository" in finding.message
    assert repository.bytes_read == before


def test_a_server_that_fails_leaves_it_open(tmp_path: Path) -> None:
    class Failing(Remote):
        def _read(self, file: str, start: int, length: int) -> bytes:
            if file.endswith(".pkl"):
                raise CheckpointError("no answer")
            return super()._read(file, start, length)

    folder = sound(tmp_path / "a")
    (folder / "a.pkl").write_bytes(pickle.dumps({}))
    (finding,) = check_pickles(read_subject(Failing(folder)))
    assert finding.unsettled
    assert "no answer" in finding.message


def test_of_remote_weights_nothing_more_is_read_than_the_sample(tmp_path: Path) -> None:
    repository = Remote(sound(tmp_path / "a"))
    subject = read_subject(repository)
    evidence: dict[str, list[Any]] = {tensor: [Extent(0, -1.0, 1.0)] for tensor in subject.tensors}
    before = repository.bytes_read
    assert get_detector("integrity").conclude(evidence, subject, 1e-3).findings == []
    assert repository.bytes_read == before
