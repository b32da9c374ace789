"""SARIF 2.1.0, for code scanning: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html

One run for all repositories. A detector is a rule and a finding a result; what could not be looked at is a notification
that makes the run unsuccessful, so that silence is not taken for a clean repository.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optimum_qguard import __version__
from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.scan.detectors import detector_names, get_detector
from optimum_qguard.scan.escape import json_document
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writer import register

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def write(reports: Sequence[ScanReport]) -> str:
    """See `Writer`."""
    found = [finding.detector for report in reports for finding in report.findings]
    rules = list(dict.fromkeys([*detector_names(), *found]))
    times: Counter[str] = Counter()
    run = {
        "tool": {
            "driver": {
                "name": "optimum-qguard",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": [_rule(name) for name in rules],
            }
        },
        "invocations": [
            {
                "executionSuccessful": all(report.complete for report in reports),
                "toolExecutionNotifications": [note for report in reports for note in _notifications(report)],
            }
        ],
        "results": [
            _result(report, finding, rules.index(finding.detector), times)
            for report in reports
            for finding in report.findings
        ],
        "properties": {"verdicts": [_verdict(report) for report in reports]},
    }
    return json_document({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(name: str) -> dict[str, Any]:
    summary = get_detector(name).summary if name in detector_names() else name
    return {"id": name, "name": name, "shortDescription": {"text": summary}, "properties": {"tags": ["security"]}}


def _verdict(report: ScanReport) -> dict[str, Any]:
    return {"model": printable(report.name), "verdict": report.verdict, "seed": report.seed, "full": report.full}


def _notifications(report: ScanReport) -> list[dict[str, Any]]:
    """One for the repository if it is not settled, and one for each detector that broke."""
    reasons = [f"{run.name} failed: {run.reason}" for run in report.detectors if run.state == "failed"]
    if not report.complete and not reasons:
        reasons = [f"{report.verdict}: {report.reason}"]
    return [
        {
            "level": "error",
            "message": {"text": _message(f"{report.name}: {reason}")},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(report, None)}}}],
        }
        for reason in reasons
    ]


def _result(report: ScanReport, finding: Finding, rule: int, times: Counter[str]) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(report, finding.file)}}}
    if finding.tensor is not None:
        location["logicalLocations"] = [{"fullyQualifiedName": printable(finding.tensor), "kind": "resource"}]
    properties = finding.model_dump(
        include={"format", "statistic", "value", "expected", "p_value", "unsettled"}, exclude_defaults=True
    )
    fingerprint = _fingerprint(report, finding)
    times[fingerprint] += 1
    return {
        "ruleId": finding.detector,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": _message(finding.message)},
        "locations": [location],
        "partialFingerprints": {"qguardFinding/v1": f"{fingerprint}:{times[fingerprint]}"},
        "properties": {"model": printable(report.name), **properties},
    }


def _fingerprint(report: ScanReport, finding: Finding) -> str:
    """The same for the same finding in the next commit: of what it is about, not of how much was measured."""
    about = [report.model, finding.detector, finding.file, finding.tensor, finding.format, finding.statistic]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _message(text: str) -> str:
    """Text in which no name makes a link (section 3.11.6)."""
    text = printable(text)
    if "](" in text:
        for mark in "\\[]":
            text = text.replace(mark, f"\\{mark}")
    return text


def _uri(report: ScanReport, file: str | None) -> str:
    """Of a file or of the whole repository: on the Hub, or relative to the working directory if it was named so."""
    if report.revision is not None:
        base = f"https://huggingface.co/{quote(report.model)}"
        return base if file is None else f"{base}/blob/{quote(report.revision, safe='')}/{quote(file)}"
    path = Path(report.model)
    if file is not None and path.name != file:  # a single file is named by itself
        path /= file
    if path.is_absolute() or ".." in path.parts:
        return Path(path.absolute().resolve()).as_uri()
    return quote(path.as_posix())


register("sarif", write)
