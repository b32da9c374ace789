"""What people and programs read of a report."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from jsonschema import Draft4Validator, FormatChecker, validate
from reports import CLAMPED, clean, hostile, missing, skipped, suspicious

from optimum_qguard.scan.detectors import get_detector
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writers import get_writer, writer_names

OFFICIAL = json.loads((Path(__file__).parent / "data" / "sarif-2.1.0-rtm.5.json").read_text())
ALL = [suspicious(), clean(), missing(), skipped()]


def sarif(*reports: ScanReport) -> dict[str, Any]:
    document = json.loads(get_writer("sarif")(reports))
    Draft4Validator(OFFICIAL, format_checker=FormatChecker()).validate(document)
    (run,) = document["runs"]
    return run


def test_names() -> None:
    assert writer_names() == ["html", "json", "sarif", "text"]
    with pytest.raises(ScanError, match="unknown format 'pdf'; known: html, json, sarif, text"):
        get_writer("pdf")


@pytest.mark.parametrize("name", ["html", "json", "sarif", "text"])
@pytest.mark.parametrize("reports", [[hostile()], [hostile(), clean()]], ids=["one", "two"])
def test_nothing_in_a_name_commands_a_terminal(name: str, reports: list[ScanReport]) -> None:
    written = get_writer(name)(reports)
    written.encode()
    assert written.endswith("\n")
    assert {letter for letter in written if not letter.isprintable()} <= {"\n"}


def test_json_is_the_report_and_keeps_every_letter() -> None:
    for report in (*ALL, hostile()):
        written = get_writer("json")([report])
        assert ScanReport.model_validate_json(written) == report
        validate(json.loads(written), ScanReport.model_json_schema())
    several = json.loads(get_writer("json")(ALL))
    assert [ScanReport.model_validate(each) for each in several["reports"]] == ALL


def test_text_of_one() -> None:
    lines = get_writer("text")([suspicious()]).splitlines()
    assert lines[0] == "SUSPICIOUS    org/rigged@9f3c2e1d8a77b1e0c4d55a6f0e9b8c7d6a5f4e3d"
    text = "\n".join(lines)
    assert " ".join(text.split()).count(CLAMPED.rstrip(".")) == 1
    order = [text.index(part) for part in ("ERROR from", "WARNING from residual_spikes (31)", "NOTE from provenance")]
    assert order == sorted(order)
    assert text.count("has a spike") == 10
    assert "… and 21 more" in text
    assert "density at 0.40 8.9 (1 in a clean model)" in " ".join(text.split())
    assert "Looked at 1.3% of 134,515,008 weights" in text
    assert "Seed 9a8b7c6d5e4f3a2b." in " ".join(text.split())
    assert "--full looks at every weight, --deep runs the model too" in text
    assert max(map(len, lines)) <= 100
    assert "To look closer" not in get_writer("text")([suspicious(full=True, deep=True)])


def test_text_of_several_ends_with_all_verdicts() -> None:
    lines = get_writer("text")(ALL).splitlines()
    names = ["org/rigged@9f3c2e1d8a77b1e0c4d55a6f0e9b8c7d6a5f4e3d", "models/clean", "org/missing", "org/gguf"]
    verdicts = ["SUSPICIOUS", "CLEAN", "INCONCLUSIVE", "SKIPPED"]
    assert lines[-5:] == ["4 repositories:", *(f"{v:<12}  {n}" for v, n in zip(verdicts, names, strict=True))]
    text = " ".join(" ".join(lines).split())
    assert "org/missing: no such repository on the Hub; if it is private set HF_TOKEN" in text
    assert "quantization_gap not run: only in a deep scan." in text


def test_no_name_can_write_a_line_of_its_own() -> None:
    lines = get_writer("text")([hostile()]).splitlines()
    assert {line for line in lines[1:] if not line.startswith(" ")} == {""}


def test_sarif_is_valid_and_says_everything() -> None:
    run = sarif(*ALL)
    results = run["results"]
    assert [result["level"] for result in results] == ["error"] + ["warning"] * 31 + ["note"]
    for result in results:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    integrity = next(rule for rule in run["tool"]["driver"]["rules"] if rule["id"] == "integrity")
    assert integrity["shortDescription"]["text"] == get_detector("integrity").summary
    spike = results[1]
    (location,) = spike["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == (
        "https://huggingface.co/org/rigged/blob/9f3c2e1d8a77b1e0c4d55a6f0e9b8c7d6a5f4e3d/model-00001-of-00002.safetensors"
    )
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "model.layers.0.self_attn.q_proj.weight"
    assert spike["properties"] == {
        "model": suspicious().name,
        "format": "int8-rowwise",
        "statistic": "density at 0.40",
        "value": 9,
        "expected": 1,
        "p_value": 1e-20,
    }


def test_sarif_of_what_was_not_settled_is_unsuccessful() -> None:
    assert sarif(clean())["invocations"] == [{"executionSuccessful": True, "toolExecutionNotifications": []}]
    assert sarif(suspicious())["invocations"][0]["executionSuccessful"]
    for report in (missing(), skipped()):
        (invocation,) = sarif(clean(), report)["invocations"]
        assert not invocation["executionSuccessful"]
        (note,) = invocation["toolExecutionNotifications"]
        assert note["message"]["text"] == f"{report.name}: {report.verdict}: {report.reason}"


def test_sarif_fingerprints_are_of_what_a_finding_is_about() -> None:
    def prints(report: ScanReport) -> list[str]:
        return [result["partialFingerprints"]["qguardFinding/v1"] for result in sarif(report)["results"]]

    report = suspicious()
    assert len(set(prints(report))) == len(report.findings)
    again = [finding.model_copy(update={"value": 5.0, "p_value": 0.1}) for finding in report.findings]
    assert prints(suspicious(findings=again, revision="0" * 40, seed="1")) == prints(report)
    assert not set(prints(suspicious(model="org/other"))) & set(prints(report))
    assert len(set(prints(suspicious(findings=[report.findings[0]] * 2)))) == 2


@pytest.mark.parametrize(
    ("model", "file", "uri"),
    [
        ("models/my model", "a:b#c?d%.safetensors", "models/my%20model/a%3Ab%23c%3Fd%25.safetensors"),
        ("models/x.safetensors", "x.safetensors", "models/x.safetensors"),
        ("/models/é", "x.safetensors", "file:///models/%C3%A9/x.safetensors"),
        ("models/x", None, "models/x"),
    ],
)
def test_sarif_locations_of_local_models(model: str, file: str | None, uri: str) -> None:
    findings = [suspicious().findings[0].model_copy(update={"file": file})]
    (result,) = sarif(suspicious(model=model, revision=None, findings=findings))["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_sarif_of_hostile_names() -> None:
    run = sarif(hostile())
    (result,) = run["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert re.fullmatch(r"https://huggingface\.co/[A-Za-z0-9%/._~-]+", uri)
    assert urlsplit(uri).netloc == "huggingface.co"
    assert "<script>" in unquote(uri)
    assert not re.search(r"(?<!\\)\](?=\()", result["message"]["text"])  # section 3.11.6: no link
