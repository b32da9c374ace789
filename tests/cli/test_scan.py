"""``qguard scan``: verdicts and exit codes; reports in four forms; or one clear line."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from optimum_qguard import ScanReport
from optimum_qguard.cli import encrypt, scan
from optimum_qguard.cli.scan import exit_code
from optimum_qguard.encrypt.manifest import Mode
from optimum_qguard.scan.engines import engine_names
from optimum_qguard.scan.finding import SEVERITIES, Finding
from optimum_qguard.scan.report import failed_report
from optimum_qguard.scan.writers import writer_names

Run = Callable[..., Any]


@pytest.fixture
def rigged(tmp_path: Path) -> Path:
    folder = tmp_path / "rigged [bold]"
    folder.mkdir()
    save_file({"weight": torch.tensor([1.0, torch.nan])}, folder / "model.safetensors")
    return folder


def test_clean(qguard: Run, tiny_llama: Path) -> None:
    result = qguard("scan", tiny_llama)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"CLEAN         {tiny_llama}"
    assert "21 of 21 tensors" in result.out


def test_findings(qguard: Run, rigged: Path) -> None:
    result = qguard("scan", rigged)
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[0] == f"SUSPICIOUS    {rigged}"
    assert "1 of the weights of weight " in " ".join(result.out.split())


def test_options(qguard: Run, rigged: Path, tiny_llama: Path) -> None:
    report = ScanReport.model_validate_json(
        qguard("scan", tiny_llama, "--full", "--seed", "1f", "--detectors", "integrity", "--json").out
    )
    assert (report.full, report.deep, report.seed) == (True, False, "1f")
    assert [run.name for run in report.detectors] == ["integrity"]
    assert report.coverage.weights_scanned == report.coverage.weights
    again = qguard("scan", tiny_llama, "--full", "--seed", report.seed, "--format", "json").json
    assert again["coverage"] == report.model_dump(mode="json")["coverage"]


@pytest.mark.parametrize(
    ("option", "known"),
    [("format", writer_names()), ("engine", engine_names()), ("fail_on", list(SEVERITIES)), ("mode", get_args(Mode))],
)
def test_choices_are_those_that_there_are(option: str, known: Sequence[str]) -> None:
    """They are repeated there, since looking them up would make ``qguard --help`` slow."""
    verb = encrypt.command if option == "mode" else scan.command
    hint = get_type_hints(verb)[option]
    choices = next(each for each in (hint, *get_args(hint)) if get_origin(each) is Literal)
    assert sorted(get_args(choices)) == sorted(known)


def test_worst_of_all(qguard: Run, tiny_llama: Path, rigged: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    (empty := tmp_path / "empty").mkdir()
    assert qguard("scan", tiny_llama, empty).code == 2
    result = qguard("scan", tiny_llama, missing, "--json")
    assert (result.code, result.err) == (2, f"qguard: {missing}: no such folder or file\n")
    assert [report["verdict"] for report in result.json["reports"]] == ["clean", "inconclusive"]
    result = qguard("scan", missing, rigged, empty, "--workers", 3)
    assert result.code == 1
    assert result.out.splitlines()[-4:] == [
        "3 repositories:",
        f"INCONCLUSIVE  {missing}",
        f"SUSPICIOUS    {rigged}",
        f"SKIPPED       {empty}",
    ]


@pytest.mark.parametrize(("fail_on", "codes"), [("note", (1, 1, 1)), ("warning", (0, 1, 1)), ("error", (0, 0, 1))])
def test_fail_on(fail_on: Any, codes: tuple[int, ...]) -> None:
    def report(severity: str, **changes: Any) -> ScanReport:
        verdict = "clean" if severity == "note" else "suspicious"
        finding = Finding(detector="integrity", severity=severity, message="It is.", **changes)
        return ScanReport(model="model", verdict=verdict, reason="It is.", findings=[finding])

    assert tuple(exit_code([report(severity)], fail_on) for severity in ("note", "warning", "error")) == codes
    unsettled = report("note", unsettled=True)
    assert exit_code([unsettled], fail_on) == (codes[0] or 2)
    assert exit_code([report("error"), failed_report("model", "lost")], fail_on) == 1


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html"])
def test_output(qguard: Run, rigged: Path, tmp_path: Path, form: str) -> None:
    output = tmp_path / "report"
    output.write_text("older")
    result = qguard("scan", rigged, "--format", form, "--output", output)
    assert (result.code, result.out, result.err) == (1, f"suspicious: {rigged}\n", "")
    written = output.read_text(encoding="utf-8")
    assert "NaN or infinite" in written
    assert qguard("scan", rigged, "--format", form).out[:30] == written[:30]
    assert {path.name for path in tmp_path.iterdir()} == {"report", rigged.name}


def test_a_list_of_models(qguard: Run, tiny_llama: Path, rigged: Path, tmp_path: Path) -> None:
    models = tmp_path / "list.txt"
    models.write_text(f"# all of ours\n\n{rigged}  # odd\n  {tiny_llama}\n{rigged}\n")
    result = qguard("scan", tiny_llama, "--from-file", models, "--json")
    assert [report["model"] for report in result.json["reports"]] == [str(tiny_llama), str(rigged)]
    assert result.code == 1


def test_a_single_file(qguard: Run, tiny_llama: Path) -> None:
    result = qguard("scan", tiny_llama / "model.safetensors", "--json")
    assert (result.code, result.json["verdict"]) == (0, "clean")


def test_names_cannot_command_the_terminal(qguard: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31m[red]\nb"
    result = qguard("scan", folder)
    assert result.code == 2
    assert f"{tmp_path}/a\\x1b[31m[red]\\x0ab: no such folder or file" in result.err
    for text in (result.out, result.err):
        assert {letter for letter in text if not letter.isprintable()} == {"\n"}


def test_bad_input(refused: Run, tiny_llama: Path, rigged: Path, tmp_path: Path) -> None:
    assert "no MODEL given" in refused("scan", code=64)
    assert "--seed 'x' is no hexadecimal number" in refused("scan", tiny_llama, "--seed", "x", code=64)
    assert "contradict" in refused("scan", tiny_llama, "--json", "--format", "html", code=64)
    assert "--fail-on" in refused("scan", tiny_llama, "--fail-on", "fatal", code=64)
    assert "known: " in refused("scan", tiny_llama, "--detectors", "none")
    assert "cannot be read as text (No such file" in refused("scan", "--from-file", tmp_path / "none")
    assert "name a UTF-8 file" in refused("scan", "--from-file", rigged / "model.safetensors")
    assert "name a file" in refused("scan", tiny_llama, "--output", tmp_path / "none" / "report")
    assert "name a file" in refused("scan", tiny_llama, "--output", tmp_path)


def test_transformers_is_not_imported(tiny_llama: Path) -> None:
    """It takes seconds, and only a deep scan needs it."""
    code = "import sys; from optimum_qguard.cli import main; main(sys.argv[1:]); print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, "scan", str(tiny_llama), "--format", "html"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "False"
