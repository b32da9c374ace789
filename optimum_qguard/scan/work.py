"""The part of a scan that can be done anywhere: some tensors of one file, all detectors. What engines distribute."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_qguard.checkpoint.repository import Repository
from optimum_qguard.scan.detector import Detector
from optimum_qguard.scan.detectors import get_detector
from optimum_qguard.scan.errors import describe
from optimum_qguard.scan.sample import Sample, samples
from optimum_qguard.scan.subject import StoredTensor, Subject

_TASK_TENSORS = 32
_BATCH_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Task:
    """Some tensors, one after the other in one file.

    Attributes:
        model, revision: what `open_repository` takes, where the work is done elsewhere.
        tensors: to look at.
        detectors: names of those that look.
        seed, full: see `samples`.
    """

    model: str
    revision: str | None
    tensors: tuple[StoredTensor, ...]
    detectors: tuple[str, ...]
    seed: int
    full: bool


@dataclass
class Result:
    """What came of a task.

    Attributes:
        evidence: by detector and tensor, one entry for each piece.
        failures: the first of each detector.
        seconds: by detector.
        weights: looked at, by tensor.
        bytes_read: from the repository.
    """

    evidence: dict[str, dict[str, list[Any]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_read: int = 0

    def add(self, other: Result) -> None:
        """Take in what another task found."""
        for detector, tensors in other.evidence.items():
            for tensor, pieces in tensors.items():
                self.evidence[detector][tensor] += pieces
        self.failures = {**other.failures, **self.failures}
        for detector, seconds in other.seconds.items():
            self.seconds[detector] += seconds
        for tensor, weights in other.weights.items():
            self.weights[tensor] += weights
        self.bytes_read += other.bytes_read


def tasks(subject: Subject, detectors: Sequence[str]) -> Iterator[Task]:
    """All tensors that hold weights which are not quantized, in tasks."""
    by_file: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in subject.tensors.values():
        if tensor.is_float:
            by_file[tensor.file].append(tensor)
    for found in by_file.values():
        for first in range(0, len(found), _TASK_TENSORS):
            yield Task(
                subject.repository.name,
                subject.repository.revision,
                tuple(found[first : first + _TASK_TENSORS]),
                tuple(detectors),
                subject.seed,
                subject.full,
            )


def work(task: Task, repository: Repository) -> Result:
    """Do a task. A detector that fails is left out from there on, and said so; a file that cannot be read fails all."""
    result = Result()
    active = [get_detector(name) for name in task.detectors]
    before = repository.bytes_read
    for together in _batches(task, repository):
        _add_evidence(result, together, active)
        together.clear()  # before the next ones are read
    result.bytes_read = repository.bytes_read - before
    return result


def _add_evidence(result: Result, together: Sequence[Sample], active: list[Detector]) -> None:
    """Let every detector look; those that fail are removed from ``active``."""
    for detector in list(active):
        start = time.perf_counter()
        try:
            found = _examined(detector, together)
        except _ExamineError as error:
            result.failures[detector.name] = str(error)
            active.remove(detector)
            continue
        finally:
            result.seconds[detector.name] += time.perf_counter() - start
        for sample, evidence in zip(together, found, strict=True):
            if evidence is not None:
                result.evidence[detector.name][sample.tensor].append(evidence)
    for sample in together:
        result.weights[sample.tensor] += sample.rows.numel()


def _batches(task: Task, repository: Repository) -> Iterator[list[Sample]]:
    """All samples of a task, some at a time."""
    together: list[Sample] = []
    weights = 0
    for tensor in task.tensors:
        for sample in samples(repository, tensor, task.seed, full=task.full):
            together.append(sample)
            weights += sample.rows.numel()
            if weights >= _BATCH_WEIGHTS:
                yield together
                together, weights = [], 0
    if together:
        yield together


class _ExamineError(Exception):
    """Of a detector, at a tensor that the message names."""


def _examined(detector: Detector, together: Sequence[Sample]) -> Sequence[Any]:
    try:
        return detector.examine_many(together)
    except Exception:  # one after the other, to see which it is
        return [_examined_alone(detector, sample) for sample in together]


def _examined_alone(detector: Detector, sample: Sample) -> Any:
    try:
        return detector.examine(sample)
    except Exception as error:
        raise _ExamineError(f"{sample.tensor}: {describe(error)}") from error
