"""What a scan found, in the form in which it is stored and sent."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from optimum_qguard import __version__
from optimum_qguard.scan.finding import SEVERITIES, Finding, Line, Plot, Severity

Verdict = Literal["clean", "suspicious", "inconclusive", "skipped"]


class DetectorRun(BaseModel):
    """What became of one detector.

    Attributes:
        state: ``"not run"`` if this repository has nothing for it, ``"failed"`` if it broke.
        reason: why it did not run, or what broke.
        tensors: how many it looked at.
        seconds: of computing, of all workers together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Line
    state: Literal["ran", "not run", "failed"]
    reason: Line | None = None
    tensors: int = 0
    seconds: float = 0.0


class Coverage(BaseModel):
    """How much was looked at.

    Attributes:
        tensors, weights, bytes: that the repository's safetensors files hold.
        tensors_to_scan: that hold weights which are not quantized.
        tensors_scanned, weights_scanned: that detectors looked at.
        bytes_read: from its files, headers included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: int = 0
    tensors_to_scan: int = 0
    tensors_scanned: int = 0
    weights: int = 0
    weights_scanned: int = 0
    bytes: int = 0
    bytes_read: int = 0


class ScanReport(BaseModel):
    """Everything about one scan of one repository.

    Attributes:
        schema_version: of this layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: as it was named, and ``revision``, the Hub's commit if there was one.
        verdict: ``"suspicious"``: there are findings above notes; ``"clean"``: there are none, and everything that was
            to be looked at was; ``"inconclusive"``: not everything could be, or a finding leaves it open;
            ``"skipped"``: there is nothing in it that can be scanned.
        reason: in one sentence.
        protection: what the repository says of itself: ``"encrypted"`` or ``"guarded"``.
        full, deep: how it was scanned.
        seed: with it the same weights are looked at again.
        seconds: that it took.
        coverage, detectors, findings, plots: see there; findings from most to least severe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    package_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    model: Line
    revision: Line | None = None
    verdict: Verdict
    reason: Line
    protection: Literal["encrypted", "guarded"] | None = None
    full: bool = False
    deep: bool = False
    seed: str = Field(default="0", pattern="^[0-9a-f]+$")
    seconds: float = 0.0
    coverage: Coverage = Coverage()
    detectors: list[DetectorRun] = Field(default_factory=list)
    findings: list[Finding] = Field(default_factory=list)
    plots: list[Plot] = Field(default_factory=list)

    @property
    def name(self) -> str:
        """The model and its revision, as it is named on the command line."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    def has_findings(self, level: Severity = "warning") -> bool:
        """Whether there is a finding of this severity or a higher one."""
        least = SEVERITIES.index(level)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether everything that was to be looked at was, and nothing is left open."""
        return (
            self.verdict in ("clean", "suspicious")
            and self.coverage.tensors_scanned >= self.coverage.tensors_to_scan
            and not any(run.state == "failed" for run in self.detectors)
            and not any(finding.unsettled for finding in self.findings)
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict} ({self.reason})"

    __repr__ = __str__


def failed_report(model: str, reason: str) -> ScanReport:
    """Of a repository that could not be scanned at all."""
    return ScanReport(model=model, verdict="inconclusive", reason=reason)


def judge(
    detectors: list[DetectorRun], findings: list[Finding], coverage: Coverage, floats: int
) -> tuple[Verdict, str]:
    """The verdict and its reason.

    Args:
        floats: how many tensors hold weights that are not quantized.
    """
    raised = [finding for finding in findings if finding.severity != "note"]
    if raised:
        more = f", and {len(raised) - 1} more finding(s)" if len(raised) > 1 else ""
        return "suspicious", f"{raised[0].message.rstrip('.')}{more}"
    failed = [run for run in detectors if run.state == "failed"]
    if failed:
        return "inconclusive", f"{failed[0].name} failed: {failed[0].reason}"
    open_ones = [finding for finding in findings if finding.unsettled]
    if open_ones:
        return "inconclusive", open_ones[0].message
    if not coverage.tensors:
        return "skipped", "there are no safetensors weights in it"
    if not floats:
        return "skipped", "all its weights are quantized already, so nothing can be said about their rounding"
    if coverage.tensors_scanned < floats:
        return "inconclusive", f"{floats - coverage.tensors_scanned} of {floats} tensors were not looked at"
    return "clean", "no detector found anything above a note" if findings else "no detector found anything"
