"""Pickles, which can run code when they are opened. They are not opened here, but handed to picklescan."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.reader import PICKLE_SUFFIXES
from optimum_qguard.scan.checks.pickle_worker import SECONDS
from optimum_qguard.scan.finding import Finding, listed
from optimum_qguard.scan.subject import Subject

_SUFFIXES = PICKLE_SUFFIXES | {".joblib"}
_LARGEST_REMOTE = 64 << 20
_TRAINER = frozenset(
    {
        "accelerate.state.PartialState",
        "accelerate.utils.dataclasses.DistributedType",
        "torch.device",
        "transformers.trainer_pt_utils.AcceleratorConfig",
        "transformers.trainer_utils.EvaluationStrategy",
        "transformers.trainer_utils.FSDPOption",
        "transformers.trainer_utils.HubStrategy",
        "transformers.trainer_utils.IntervalStrategy",
        "transformers.trainer_utils.SaveStrategy",
        "transformers.trainer_utils.SchedulerType",
        "transformers.training_args.OptimizerNames",
        "transformers.training_args.TrainingArguments",
    }
)
"""What the ``training_args.bin`` imports that transformers writes beside many models: nothing that acts by itself."""


@dataclass(frozen=True)
class _Seen:
    """What picklescan saw in one file: names that it imports, and whether it could be read to its end."""

    dangerous: list[str]
    suspicious: list[str]
    complete: bool


def check_pickles(subject: Subject) -> Iterator[Finding]:
    """picklescan's verdict on each pickle; what it did not see leaves the repository unsettled."""
    files = [file for file in subject.repository.files if PurePosixPath(file).suffix.lower() in _SUFFIXES]
    if not files:
        return
    note = partial(Finding, detector="integrity", severity="note")
    if importlib.util.find_spec("picklescan") is None:
        message = (
            f"Pickles can run code when they are opened; install picklescan to have them looked at: {listed(files)}."
        )
        yield note(message=message, unsettled=True)
        return
    harmless = []
    for file in files:
        try:
            seen = _picklescan(subject, file)
        except CheckpointError as error:
            message = f"{file} is a pickle, which can run code when it is opened, and was not looked at: {error}."
            yield note(file=file, message=message, unsettled=True)
            continue
        if seen.dangerous:
            message = f"Opening {file} would run code, picklescan says: it calls {listed(seen.dangerous)}."
            yield Finding(detector="integrity", severity="error", file=file, message=message)
        elif not seen.complete:
            message = f"{file} is a pickle, or should be, that picklescan cannot read to its end."
            yield note(file=file, message=message, unsettled=True)
        elif not _TRAINER.issuperset(seen.suspicious):
            message = f"{file} is a pickle with imports that picklescan does not know: {listed(seen.suspicious)}."
            yield note(file=file, message=message, unsettled=True)
        else:
            harmless.append(file)
    if harmless:
        message = (
            f"picklescan finds nothing dangerous in the pickles, whose weights were not looked at: {listed(harmless)}."
        )
        yield note(message=message, unsettled=not subject.tensors)


def _picklescan(subject: Subject, file: str) -> _Seen:
    worker = Path(__file__).with_name("pickle_worker.py")
    command = [sys.executable, "-I", str(worker), PurePosixPath(file).suffix.lower()]
    with _opened(subject, file) as stream:
        try:
            done = subprocess.run(command, stdin=stream, capture_output=True, timeout=2 * SECONDS, check=False)  # noqa: S603  no shell, our own script
        except subprocess.TimeoutExpired as error:
            raise CheckpointError("picklescan does not come to an end") from error
        except OSError as error:
            raise CheckpointError(f"picklescan could not be run ({error.strerror or error})") from error
    if done.returncode != 0:
        raise CheckpointError("picklescan breaks on it")
    return _Seen(**json.loads(done.stdout))


@contextlib.contextmanager
def _opened(subject: Subject, file: str) -> Iterator[IO[bytes]]:
    """The file, as one that another process can seek in."""
    repository = subject.repository
    if repository.local_folder is not None:
        try:
            stream = (repository.local_folder / file).open("rb")
        except OSError as error:
            raise CheckpointError(f"it cannot be read ({error.strerror or error})") from error
        with stream:
            yield stream
        return
    if repository.files[file].size > _LARGEST_REMOTE:
        raise CheckpointError(f"it has more than {_LARGEST_REMOTE >> 20} MB, so download the repository to scan it")
    with tempfile.TemporaryFile() as copy:
        copy.write(repository.read(file))
        copy.seek(0)
        yield copy
