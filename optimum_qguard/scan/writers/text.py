"""Plain text for people: the verdict first, then the findings, then how much was looked at and how to look closer."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence

from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.scan.finding import SEVERITIES, Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writer import register

MOST_SHOWN = 10
"""Findings of one detector and severity."""

_WIDTH = 100


def write(reports: Sequence[ScanReport]) -> str:
    """See `Writer`."""
    lines = [line for report in reports for line in (*_report(report), "")]
    if len(reports) > 1:
        lines += [f"{len(reports)} repositories:", *(_verdict_line(report) for report in reports)]
    else:
        lines.pop()
    return "\n".join(lines) + "\n"


def _verdict_line(report: ScanReport) -> str:
    return f"{report.verdict.upper():<12}  {printable(report.name)}"


def _report(report: ScanReport) -> Iterator[str]:
    yield _verdict_line(report)
    if not any(report.reason.startswith(finding.message.rstrip(".")) for finding in report.findings):
        yield from _wrapped(report.reason, "  ")
    if report.protection is not None:
        yield f"  It says of itself that it is {report.protection}."
    yield from _findings(report.findings)
    if report.coverage.tensors:
        yield ""
        yield from _coverage(report)
    yield from _detectors(report)
    yield from _wrapped(_closer(report), "  ")


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.detector].append(finding)
    ordered = sorted(groups.items(), key=lambda item: SEVERITIES.index(item[1][0].severity), reverse=True)
    for (severity, detector), found in ordered:
        yield ""
        yield f"  {severity.upper()} from {printable(detector)}" + (f" ({len(found)})" if len(found) > 1 else "")
        for finding in found[:MOST_SHOWN]:
            yield from _wrapped(finding.message, "    ")
            if details := ", ".join(_details(finding)):
                yield from _wrapped(details, "      ")
        if len(found) > MOST_SHOWN:
            yield f"    … and {len(found) - MOST_SHOWN} more; --format json has all of them"


def _details(finding: Finding) -> Iterator[str]:
    if finding.tensor is not None and finding.tensor not in finding.message:
        yield finding.tensor
    if finding.file is not None and finding.file not in finding.message:
        yield f"in {finding.file}"
    if finding.format is not None and finding.format not in finding.message:
        yield f"as {finding.format}"
    if finding.value is not None:
        expected = "" if finding.expected is None else f" ({finding.expected:.4g} in a clean model)"
        yield f"{finding.statistic or 'value'} {finding.value:.4g}{expected}"
    if finding.p_value is not None:
        yield f"p {finding.p_value:.1e}"


def _coverage(report: ScanReport) -> Iterator[str]:
    coverage = report.coverage
    share = coverage.weights_scanned / coverage.weights if coverage.weights else 1
    yield from _wrapped(
        f"Looked at {share:.1%} of {coverage.weights:,} weights, in {coverage.tensors_scanned} of {coverage.tensors} "
        f"tensors; {coverage.bytes_read / 1e6:,.1f} of {coverage.bytes / 1e6:,.1f} MB read in {report.seconds:.1f} s. "
        f"Seed {report.seed}.",
        "  ",
    )


def _detectors(report: ScanReport) -> Iterator[str]:
    if ran := [run.name for run in report.detectors if run.state == "ran"]:
        yield from _wrapped(f"Detectors: {', '.join(ran)}.", "  ")
    for run in report.detectors:
        if run.state != "ran":
            yield from _wrapped(f"{run.name} {run.state}: {run.reason}.", "  ")


def _closer(report: ScanReport) -> str:
    if not report.coverage.tensors_to_scan:
        return ""
    ways = [] if report.full else ["--full looks at every weight"]
    if not report.deep:
        ways.append("--deep runs the model too")
    return f"To look closer: {', '.join(ways)}." if ways else ""


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        printable(text),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


register("text", write)
