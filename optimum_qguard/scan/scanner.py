"""Scans a repository: samples its weights, asks every detector, and judges."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.protection import PROTECTED
from optimum_qguard.checkpoint.repository import open_repository
from optimum_qguard.scan.detector import ALPHA, Detector
from optimum_qguard.scan.detectors import detector_names, get_detector
from optimum_qguard.scan.engines import get_engine
from optimum_qguard.scan.errors import describe
from optimum_qguard.scan.finding import SEVERITIES, Conclusion
from optimum_qguard.scan.report import Coverage, DetectorRun, ScanReport, judge
from optimum_qguard.scan.subject import Subject, read_subject
from optimum_qguard.scan.work import Result, tasks

Progress = Callable[[int, int], None]

WORKERS = 2
WORKERS_REMOTE = 8
"""Requests at the same time."""


def scan(
    model: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    full: bool = False,
    deep: bool = False,
    detectors: Sequence[str] | None = None,
    seed: int | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Look inside a checkpoint's weights for what quantization would bring out. Nothing in it is run or unpickled,
    unless ``deep`` is given; then its model is, by transformers, without code from the repository.

    Args:
        model: a folder, a safetensors file, or a Hub id, of which only the bytes that are looked at are fetched.
        revision: of the Hub's repository.
        base: the model that it claims to be a fine-tune of; then it is said which tensors changed and how.
        full: look at every weight, not a sample.
        deep: run the model too.
        detectors: names of those that take part; all by default.
        seed: of the sample; from the operating system by default, so that nobody can foresee it.
        engine: ``"local"`` or ``"ray"``.
        workers: threads, or Ray tasks at a time.
        progress: called with how many tensors are done and how many there are.

    Raises:
        CheckpointError: there is no such repository, or it cannot be read. What is wrong inside it is a finding.
        ScanError: unknown detector or engine.
    """
    start = time.perf_counter()
    chosen = [get_detector(name) for name in detectors or detector_names()]
    distribute = get_engine(engine)
    repository = open_repository(model, revision=revision)
    base_repository = None if base is None else open_repository(base)
    try:
        subject = read_subject(
            repository,
            base=None if base_repository is None else read_subject(base_repository),
            full=full,
            deep=deep,
            seed=secrets.randbits(64) if seed is None else seed,
        )
        result = Result()
        work = list(tasks(subject, [detector.name for detector in chosen]))
        done, total = 0, sum(len(task.tensors) for task in work)
        default = WORKERS if repository.local_folder is not None else WORKERS_REMOTE
        for part in distribute(work, repository, workers or default):
            result.add(part)
            done += len({*part.weights})
            if progress is not None:
                progress(done, total)
        conclusions = {detector.name: _conclude(detector, subject, result, len(chosen)) for detector in chosen}
    finally:
        repository.close()
        if base_repository is not None:
            base_repository.close()
    return _report(subject, result, conclusions, time.perf_counter() - start)


def _conclude(detector: Detector, subject: Subject, result: Result, detectors: int) -> Conclusion | str:
    """Its conclusion, or what broke."""
    if detector.deep and not subject.deep:
        return Conclusion(not_run="only in a deep scan")
    if detector.name in result.failures:
        return result.failures[detector.name]
    start = time.perf_counter()
    # In the order of the file, whatever order the work was done in.
    evidence = {
        name: result.evidence[detector.name][name] for name in subject.tensors if name in result.evidence[detector.name]
    }
    try:
        return detector.conclude(evidence, subject, ALPHA / detectors)
    except Exception as error:
        return describe(error)
    finally:
        result.seconds[detector.name] += time.perf_counter() - start


def _report(subject: Subject, result: Result, conclusions: dict[str, Conclusion | str], seconds: float) -> ScanReport:
    repository = subject.repository
    runs = [_run(name, conclusion, result) for name, conclusion in conclusions.items()]
    sound = [conclusion for conclusion in conclusions.values() if isinstance(conclusion, Conclusion)]
    findings = [finding for conclusion in sound for finding in conclusion.findings]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity), reverse=True)
    infos = [tensor.info for tensor in subject.tensors.values()]
    floats = sum(tensor.is_float and tensor.info.n_elements > 0 for tensor in subject.tensors.values())
    coverage = Coverage(
        tensors=len(infos),
        tensors_to_scan=floats,
        tensors_scanned=len(result.weights),
        weights=sum(info.n_elements for info in infos),
        weights_scanned=sum(result.weights.values()),
        bytes=sum(file.size for name, file in repository.files.items() if name.endswith(".safetensors")),
        bytes_read=repository.bytes_read,
    )
    verdict, reason = judge(runs, findings, coverage, floats)
    return ScanReport(
        model=repository.name,
        revision=repository.revision,
        verdict=verdict,
        reason=reason,
        protection=_protection(subject.manifest),
        full=subject.full,
        deep=subject.deep,
        seed=f"{subject.seed:x}",
        seconds=seconds,
        coverage=coverage,
        detectors=runs,
        findings=findings,
        plots=[plot for conclusion in sound for plot in conclusion.plots],
    )


def _run(name: str, conclusion: Conclusion | str, result: Result) -> DetectorRun:
    numbers: dict[str, Any] = {"tensors": len(result.evidence[name]), "seconds": result.seconds[name]}
    if isinstance(conclusion, str):
        return DetectorRun(name=name, state="failed", reason=conclusion, **numbers)
    if conclusion.not_run is not None:
        return DetectorRun(name=name, state="not run", reason=conclusion.not_run, **numbers)
    return DetectorRun(name=name, state="ran", **numbers)


def _protection(manifest: Any) -> Any:
    if manifest.get("kind") == PROTECTED:
        return "encrypted"
    return "guarded" if "quantization_config" in manifest else None
