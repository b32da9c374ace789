"""What the bot writes on the Hub."""

from __future__ import annotations

import re

from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.scan.report import ScanReport

_MOST_FINDINGS = 20
_LONGEST_MESSAGE = 500
_MARKER = "<!-- qguard-bot:{commit} -->"
_MEANINGS = {
    "clean": "No detector found anything that quantization would bring out.",
    "suspicious": "Something in the weights or files is not as it is in a clean checkpoint.",
    "inconclusive": "The scan could not settle whether this checkpoint is clean.",
    "skipped": "There is nothing in it that this scan can judge; that does not mean that it is clean.",
}


def title(report: ScanReport) -> str:
    """Of a discussion or pull request; `is_title` recognises it."""
    return f"QGuard scan of {(report.revision or '')[:8]}: {report.verdict}"


def is_title(text: str, commit: str) -> bool:
    """Whether it may be the title of what the bot said about a commit, of which the beginning is enough."""
    return text.startswith(f"QGuard scan of {commit[:8]}")


def marker(commit: str) -> str:
    """A comment that nobody sees, by which what the bot said about a commit is recognised."""
    return _MARKER.format(commit=commit)


def discussion(report: ScanReport) -> str:
    """The report in Markdown, short."""
    return "\n\n".join(
        [
            f"**Verdict: {report.verdict}.** {_MEANINGS[report.verdict]}",
            f"Reason: {_text(report.reason)}",
            *_findings(report),
            _scope(report),
            f"To repeat it:\n\n```bash\npip install optimum-qguard\n{_command(report)}\n```",
            "This was written by a bot; no file was run or unpickled. If you think it is wrong, say so below.",
            marker(report.revision or ""),
        ]
    )


def card_section(report: ScanReport, content: str) -> str:
    """The report as a section of the model card.

    Args:
        content: the fingerprint of what was scanned.
    """
    return "\n\n".join(
        [
            "## Scan for behaviour planted for quantization",
            f"**Verdict: {report.verdict}.** {_text(report.reason)}",
            *_findings(report),
            f"{_scope(report)} Repeat it with `{_command(report)}`.",
            content_marker(content, report.verdict),
        ]
    )


def content_marker(content: str, verdict: str) -> str:
    """A comment that nobody sees, by which a card's section and its pull request are recognised."""
    return f"<!-- qguard-scanned:{content}:{verdict} -->"


def _command(report: ScanReport) -> str:
    return f"qguard scan {report.name}{' --full' if report.full else ''}"


def _scope(report: ScanReport) -> str:
    coverage = report.coverage
    share = coverage.weights_scanned / coverage.weights if coverage.weights else 0.0
    looked = (
        f"{coverage.tensors_scanned:,} of {coverage.tensors:,} tensors and {share:.1%} of the weights were looked at"
        f" ({'all' if report.full else 'a random sample'}), {coverage.bytes_read / 1e6:,.1f} MB read"
    )
    ran = [run.name for run in report.detectors if run.state == "ran"]
    others = [f"{run.name} ({run.state})" for run in report.detectors if run.state != "ran"]
    by = f" Detectors: {', '.join([*ran, *others])}." if report.detectors else ""
    return f"{looked}, by optimum-qguard {report.package_version}.{by}"


def _findings(report: ScanReport) -> list[str]:
    if not report.findings:
        return []
    lines = []
    for finding in report.findings[:_MOST_FINDINGS]:
        place = finding.tensor or finding.file
        where = f" {_code(place)}" if place else ""
        lines.append(f"| {finding.severity} | {finding.detector}{where} | {_text(finding.message)} |")
    more = len(report.findings) - _MOST_FINDINGS
    table = "\n".join(["| severity | detector | finding |", "|---|---|---|", *lines])
    return [f"{table}\n\nand {more} more." if more > 0 else table]


def _text(text: str) -> str:
    """Names of tensors and files come from strangers: nothing in them may be a link, a mention, HTML or a table."""
    line = printable(" ".join(text.split()))
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[:_LONGEST_MESSAGE]} …"
    # Some renderers make links and mentions of what escapes have become, so these are spelt otherwise.
    defanged = re.sub(r"(?i)(https?|ftp):", r"\1[:]", re.sub(r"(?i)www\.", "www[.]", line)).replace("@", "[at]")
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", defanged)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(name: str) -> str:
    """A name as code, in which nothing is markup."""
    return f"`{re.sub('[`|]', '?', printable(name))[:200]}`"
