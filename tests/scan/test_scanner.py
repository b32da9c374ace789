"""From a repository to a verdict."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from reports import clean, missing, skipped, suspicious
from safetensors.torch import save_file

import optimum_qguard
from optimum_qguard import ScanReport, scan
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.scan import detector as detector_module
from optimum_qguard.scan.detector import Detector
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.finding import Conclusion, Finding
from optimum_qguard.scan.many import scan_many
from optimum_qguard.scan.report import Coverage, DetectorRun, failed_report, judge
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject

RAN = DetectorRun(name="integrity", state="ran")
ALL_SEEN = Coverage(tensors=3, tensors_to_scan=2, tensors_scanned=2)
NOTE, WARNING, ERROR = (
    Finding(detector="integrity", severity=severity, message=f"A {severity}.")
    for severity in ("note", "warning", "error")
)
OPEN = NOTE.model_copy(update={"unsettled": True})
FAILED = DetectorRun(name="integrity", state="failed", reason="broke")


@pytest.fixture
def seeing() -> Iterator[type[Detector]]:
    """A detector that says which rows it saw, or breaks."""

    class Seeing(Detector):
        name: ClassVar[str] = "seeing"
        summary: ClassVar[str] = "Sees."
        breaks_in: ClassVar[str] = ""

        def examine(self, sample: Sample) -> Any:
            if self.breaks_in == "examine":
                raise RuntimeError("two\nlines")
            return (sample.first_rows, float(sample.rows.double().sum()))

        def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
            if self.breaks_in == "conclude":
                raise RuntimeError
            message = f"{alpha} {dict(evidence)}"
            return Conclusion([Finding(detector=self.name, severity="note", message=message)])

    detector_module.register(Seeing)
    yield Seeing
    del detector_module._REGISTRY["seeing"]


def test_the_package_is_the_function(tiny_llama: Path) -> None:
    assert isinstance(scan, ModuleType)
    assert scan is optimum_qguard.scan
    report = scan(tiny_llama)
    assert isinstance(report, ScanReport)
    assert str(report) == f"{tiny_llama}: clean (no detector found anything)"


def test_everything_is_looked_at(tiny_llama: Path) -> None:
    told = []
    report = scan(tiny_llama, full=True, progress=lambda done, total: told.append((done, total)))
    file = tiny_llama / "model.safetensors"
    assert report.coverage == Coverage(
        tensors=21,
        tensors_to_scan=21,
        tensors_scanned=21,
        weights=report.coverage.weights,
        weights_scanned=report.coverage.weights,
        bytes=file.stat().st_size,
        bytes_read=report.coverage.bytes_read,
    )
    assert report.coverage.bytes_read >= file.stat().st_size + (tiny_llama / "config.json").stat().st_size
    assert told[-1] == (21, 21)
    assert report.complete


def test_the_seed_brings_the_same_weights_back(tmp_path: Path, seeing: type[Detector]) -> None:
    save_file({"weight": torch.randn(5000, 64)}, tmp_path / "model.safetensors")
    first, other = (scan(tmp_path, detectors=["seeing"]) for _ in range(2))
    assert first.seed != other.seed
    assert first.findings != other.findings
    again = scan(tmp_path, detectors=["seeing"], seed=int(first.seed, 16))
    assert (again.findings, again.seed) == (first.findings, first.seed)
    assert "'weight'" in first.findings[0].message


def test_workers_change_nothing(tiny_llama: Path, tmp_path: Path, seeing: type[Detector]) -> None:
    for copy in "abc":
        shutil.copy(tiny_llama / "model.safetensors", tmp_path / f"{copy}.safetensors")
    one, four = (scan(tmp_path, detectors=["seeing"], seed=3, workers=workers) for workers in (1, 4))
    assert one.findings == four.findings
    assert one.coverage == four.coverage


def test_detectors_share_the_false_alarms(tiny_llama: Path, seeing: type[Detector]) -> None:
    assert scan(tiny_llama, detectors=["seeing"]).findings[0].message.startswith("0.001 ")
    assert scan(tiny_llama, detectors=["seeing", "integrity"]).findings[0].message.startswith("0.0005 ")


@pytest.mark.parametrize(
    ("breaks_in", "reason"), [("examine", r".+: two lines"), ("conclude", "RuntimeError")], ids=["examine", "conclude"]
)
def test_a_detector_that_breaks(tiny_llama: Path, seeing: Any, breaks_in: str, reason: str) -> None:
    seeing.breaks_in = breaks_in
    report = scan(tiny_llama, detectors=["seeing", "integrity"])
    broken, sound = report.detectors
    assert (broken.state, sound.state, sound.tensors) == ("failed", "ran", 21)
    assert re.fullmatch(reason, broken.reason)
    assert report.verdict == "inconclusive"
    assert report.reason == f"seeing failed: {broken.reason}"


def test_tensors_of_the_same_name(tmp_path: Path, seeing: type[Detector]) -> None:
    for file, value in (("a", 1.0), ("b", 2.0)):
        content = {"weight": torch.full((2, 2), value), f"only-{file}": torch.ones(1)}
        save_file(content, tmp_path / f"{file}.safetensors")
    message = scan(tmp_path, detectors=["seeing"]).findings[0].message
    for name, total in (("a.safetensors:weight", 4.0), ("b.safetensors:weight", 8.0), ("only-a", 1.0), ("only-b", 1.0)):
        assert f"'{name}': [((0,), {total})]" in message


def test_no_name_takes_another_tensors_place(tmp_path: Path, seeing: type[Detector]) -> None:
    """One that is called as the other would be told from its namesake."""
    save_file({"weight": torch.full((2, 2), 1.0)}, tmp_path / "a.safetensors")
    decoys = {"weight": torch.full((2, 2), 2.0), "a.safetensors:weight": torch.full((2, 2), 4.0)}
    save_file(decoys, tmp_path / "b.safetensors")
    report = scan(tmp_path, detectors=["seeing"])
    assert report.coverage.tensors_scanned == report.coverage.tensors == 3
    for total in (4.0, 8.0, 16.0):
        assert f"[((0,), {total})]" in report.findings[0].message


def test_nothing_to_scan(tmp_path: Path) -> None:
    report = scan(tmp_path)
    assert (report.verdict, report.complete) == ("skipped", False)
    save_file({"weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    report = scan(tmp_path)
    assert (report.verdict, report.complete) == ("skipped", False)
    assert "quantized already" in report.reason


def test_not_a_number_and_not_a_file(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor([1.0, torch.nan])}, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-1])
    report = scan(tmp_path)
    assert report.verdict == "suspicious"
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert {finding.file for finding in errors} == {"bad.safetensors", "good.safetensors"}


def test_halves_of_characters_in_a_name(tmp_path: Path) -> None:
    header = b'{"a\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\xc0\x7f")
    report = scan(tmp_path)
    assert report.verdict == "suspicious"
    report.model_dump_json().encode()


def test_bad_input(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file"):
        scan(tmp_path / "missing")
    with pytest.raises(ScanError, match=r"unknown detector 'none'; known: .*integrity"):
        scan(tiny_llama, detectors=["none"])
    with pytest.raises(ScanError, match="unknown engine 'none'; known: local, ray"):
        scan(tiny_llama, engine="none")


@pytest.mark.parametrize(
    ("detectors", "findings", "coverage", "floats", "verdict", "reason"),
    [
        ([RAN], [], ALL_SEEN, 2, "clean", "no detector found anything"),
        ([RAN], [NOTE], ALL_SEEN, 2, "clean", "no detector found anything above a note"),
        ([RAN], [WARNING], ALL_SEEN, 2, "suspicious", "A warning"),
        ([FAILED], [ERROR, WARNING, OPEN], ALL_SEEN, 2, "suspicious", "A error, and 1 more finding(s)"),
        ([RAN], [WARNING], Coverage(), 0, "suspicious", "A warning"),
        ([RAN, FAILED], [OPEN], ALL_SEEN, 2, "inconclusive", "integrity failed: broke"),
        ([RAN], [NOTE, OPEN], ALL_SEEN, 2, "inconclusive", "A note."),
        ([RAN], [], ALL_SEEN, 3, "inconclusive", "1 of 3 tensors were not looked at"),
        ([RAN], [NOTE], Coverage(), 0, "skipped", "there are no safetensors weights in it"),
        ([FAILED], [], Coverage(), 0, "inconclusive", "integrity failed: broke"),
        ([RAN], [], Coverage(tensors=3), 0, "skipped", "all its weights are quantized already"),
    ],
)
def test_verdicts(
    detectors: list[DetectorRun], findings: list[Finding], coverage: Coverage, floats: int, verdict: str, reason: str
) -> None:
    found, why = judge(detectors, findings, coverage, floats)
    assert found == verdict
    assert why.startswith(reason)


def test_complete() -> None:
    """Only what was looked at as far as was asked, and left nothing open."""
    assert clean().complete
    assert suspicious().complete
    assert not missing().complete
    assert not skipped().complete
    for changes in (
        {"detectors": [FAILED]},
        {"findings": [OPEN]},
        {"coverage": Coverage(tensors=3, tensors_to_scan=2, tensors_scanned=1)},
    ):
        assert not suspicious(**changes).complete


@pytest.mark.parametrize("workers", [None, 1, 9])
def test_several_repositories(tiny_llama: Path, tmp_path: Path, workers: int | None) -> None:
    models = [str(tiny_llama), str(tmp_path / "missing"), str(tmp_path), str(tiny_llama / "model.safetensors")]
    told = []
    reports = scan_many(models, workers=workers, progress=lambda done, total: told.append((done, total)))
    assert [report.model for report in reports] == models
    assert [report.verdict for report in reports] == ["clean", "inconclusive", "skipped", "clean"]
    assert told == [(count, 4) for count in range(1, 5)]
    expected = failed_report(models[1], f"{models[1]}: no such folder or file")
    assert reports[1].model_dump(exclude={"created"}) == expected.model_dump(exclude={"created"})


def test_one_that_breaks_does_not_keep_the_others(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, unless no scan could be done at all."""

    def scan_or_break(model: str, **options: Any) -> ScanReport:
        if model == "odd":
            raise ZeroDivisionError("two\nlines")
        if model == "hopeless":
            raise ScanError("no cluster")
        return scan(model, **options)

    monkeypatch.setattr("optimum_qguard.scan.many.scan", scan_or_break)
    odd, fine = scan_many(["odd", str(tiny_llama)])
    assert (odd.verdict, odd.reason, fine.verdict) == ("inconclusive", "two lines", "clean")
    with pytest.raises(ScanError, match="no cluster"):
        scan_many(["hopeless", str(tiny_llama)])
    with pytest.raises(ScanError, match="unknown detector"):
        scan_many(["odd"], detectors=["none"])
