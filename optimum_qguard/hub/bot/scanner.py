"""Scans in a process of its own, that a malicious repository may take down without taking the bot down.

The process stays for many scans, since importing torch takes longer than most of them. It has limits of memory and of
time, no secret, and only the token that it reads with. What it sends back is JSON, checked here: never a pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from optimum_qguard.hub.bot.errors import ScanFailed, ScannerUnavailable
from optimum_qguard.hub.bot.settings import READ_TOKEN_VARIABLE, SECRET_VARIABLE

if TYPE_CHECKING:
    from optimum_qguard.scan.report import ScanReport

_SCANS_OF_ONE_PROCESS = 500
_LONGEST_ANSWER = 64 << 20
_POLL = 0.2
_START_LIMIT = 120.0
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", READ_TOKEN_VARIABLE, SECRET_VARIABLE)


@dataclass(frozen=True)
class Limits:
    """Of one scan.

    Attributes:
        seconds: that it may take.
        memory: bytes that it may take beyond what the process takes when it starts.
        threads: that it may compute with.
    """

    seconds: float
    memory: int
    threads: int = 1


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    report: dict[str, Any] | None = None
    error: str | None = None


class ScanProcess:
    """One scan at a time, by one thread. The process is started when needed, and anew after whatever went wrong."""

    def __init__(self, limits: Limits, token: str | None = None) -> None:
        """
        Args:
            token: to read repositories with.
        """
        self._limits = limits
        self._token = token
        self._process: Any = None
        self._connection: Connection | None = None
        self._scans = 0

    def scan(self, repository: str, revision: str, *, full: bool, anonymous: bool, stop: threading.Event) -> ScanReport:
        """Scan a commit of a Hub repository.

        Args:
            anonymous: without a token, as a stranger sees it.
            stop: once set, the scan is ended.

        Raises:
            ScanFailed: it could not be scanned, took too long or too much memory, or was ended.
            ScannerUnavailable: the process cannot be started.
        """
        from optimum_qguard.scan.report import ScanReport

        if self._process is None or not self._process.is_alive() or self._scans >= _SCANS_OF_ONE_PROCESS:
            self._start(stop)
        assert self._connection is not None
        self._scans += 1
        try:
            self._connection.send((repository, revision, full, anonymous))
            answer = _Answer.model_validate_json(self._receive(self._limits.seconds, stop))
            report = None if answer.report is None else ScanReport.model_validate(answer.report)
        except (OSError, EOFError) as error:
            self.close()
            raise ScanFailed("the scanning process ended unexpectedly") from error
        except ValidationError as error:
            self.close()
            raise ScanFailed("the scanning process sent something that is no report") from error
        except ScanFailed:
            self.close()
            raise
        if report is None:
            raise ScanFailed(answer.error or "no reason given")
        if (report.model, report.revision) != (repository, revision):
            # The token that posts would write wherever a repository that has taken over the process wants it to.
            self.close()
            raise ScanFailed("the scanning process sent the report of something else")
        return report

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self, stop: threading.Event) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid(), self._limits, self._token), daemon=True, name="qguard-scan"
        )
        self._process.start()
        theirs.close()
        self._scans = 0
        try:
            self._receive(_START_LIMIT, stop)
        except (OSError, EOFError, ScanFailed) as error:
            self.close()
            raise ScannerUnavailable("the scanning process does not start") from error

    def _receive(self, seconds: float, stop: threading.Event) -> bytes:
        assert self._connection is not None
        end = time.monotonic() + seconds
        while not self._connection.poll(_POLL):
            if stop.is_set():
                raise ScanFailed("the bot was stopped")
            if time.monotonic() > end:
                raise ScanFailed(f"took longer than {seconds:g} seconds")
        return self._connection.recv_bytes(_LONGEST_ANSWER)


def _serve(connection: Connection, parent: int, limits: Limits, token: str | None) -> None:
    """What the process does."""
    for name in _TOKENS:
        os.environ.pop(name, None)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Not where the bot was started: there a folder could have the name of a Hub repository.
    with tempfile.TemporaryDirectory(prefix="qguard-scan-") as folder:
        os.chdir(folder)
        import torch
        from huggingface_hub import constants

        from optimum_qguard.scan.detectors import detector_names
        from optimum_qguard.scan.scanner import scan  # noqa: F401  not only at the first scan

        # The token that a user of this machine has saved is not for this either.
        constants.HF_TOKEN_PATH = os.devnull
        torch.set_num_threads(limits.threads)
        detector_names()  # imports them
        _limit_memory(limits.memory)
        try:
            connection.send_bytes(b"ready")
            while True:
                connection.send_bytes(_answer(token, *connection.recv()))
        except (EOFError, OSError):
            return


def _answer(token: str | None, repository: str, revision: str, full: bool, anonymous: bool) -> bytes:
    from optimum_qguard.scan.scanner import scan

    if token is None or anonymous:
        os.environ.pop("HF_TOKEN", None)
    else:
        os.environ["HF_TOKEN"] = token
    try:
        report = scan(repository, revision=revision, full=full)
        return _Answer(report=report.model_dump(mode="json")).model_dump_json().encode()
    except MemoryError:
        reason = "needs more memory than one scan may take"
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    return _Answer(error=reason).model_dump_json().encode()


def _limit_memory(bytes: int) -> None:
    """Let this process take so much more than it has taken. Not everywhere is a limit of data obeyed (macOS)."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    limit = data + bytes
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def _end_with(parent: int) -> None:
    """End this process when the bot has ended, however that happened."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
