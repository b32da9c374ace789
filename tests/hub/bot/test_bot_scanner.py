"""The process that scans, and what a repository cannot do to the bot."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
from bot_process import checkpoint, is_alive
from hub_server import TOKEN, HubServer

from optimum_qguard.hub.bot.errors import ScanFailed, ScannerUnavailable
from optimum_qguard.hub.bot.scanner import Limits, ScanProcess
from optimum_qguard.scan.report import ScanReport

NEVER = threading.Event()


@pytest.fixture(scope="module")
def process(bots_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScanProcess]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        for name, value in bots_hub.environment(home, None).items():
            patch.setenv(name, value)
        patch.setenv("HF_HUB_OFFLINE", "0")
        # Saved on this machine by its user, and not for the scanner.
        (home / "token").write_text(TOKEN)
        scanning = ScanProcess(Limits(seconds=3, memory=64 << 20), token=TOKEN)
        yield scanning
        scanning.close()


def scan(
    process: ScanProcess, repository: str, commit: str, *, full: bool = False, anonymous: bool = False
) -> ScanReport:
    return process.scan(repository, commit, full=full, anonymous=anonymous, stop=NEVER)


def test_one_process_for_many_scans(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/tiny", checkpoint())
    first = scan(process, "org/tiny", commit)
    number = process._process.pid
    assert (first.model, first.revision, first.verdict) == ("org/tiny", commit, "clean")
    assert scan(process, "org/tiny", commit, full=True).full
    assert process._process.pid == number


def test_private_models_with_the_token_and_only_for_those_who_may(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/secret", checkpoint(), private=True)
    assert scan(process, "org/secret", commit).verdict == "clean"
    with pytest.raises(ScanFailed, match="no such repository, or it is private"):
        scan(process, "org/secret", commit, anonymous=True)
    assert scan(process, "org/secret", commit).verdict == "clean"


def test_a_folder_of_that_name_is_not_scanned(
    bots_hub: HubServer, process: ScanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/here").mkdir(parents=True)
    with pytest.raises(ScanFailed, match="no such repository"):
        scan(process, "org/here", "0" * 40)


def test_too_much_memory(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/large", checkpoint(size=4096) | {"config.json": b" " * (40 << 20)})
    number = process._process.pid
    with pytest.raises(ScanFailed, match="needs more memory than one scan may take"):
        scan(process, "org/large", commit, full=True)
    assert process._process.pid == number
    assert scan(process, "org/tiny", bots_hub.head("org/tiny")).verdict == "clean"


def test_killed_by_what_it_scanned(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/killer", checkpoint())
    bots_hub.fail("org/killer/resolve", delay=2)
    number = process._process.pid
    threading.Timer(0.5, os.kill, (number, 9)).start()
    with pytest.raises(ScanFailed, match="the scanning process ended unexpectedly"):
        scan(process, "org/killer", commit)
    assert scan(process, "org/killer", commit).verdict == "clean"
    assert process._process.pid != number


def test_too_much_time(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/slow", checkpoint())
    bots_hub.fail("org/slow/resolve", delay=30)
    number = process._process.pid
    start = time.monotonic()
    with pytest.raises(ScanFailed, match="took longer than 3 seconds"):
        scan(process, "org/slow", commit)
    assert time.monotonic() - start < 6
    assert not is_alive(number)


def test_no_token_by_default(bots_hub: HubServer, process: ScanProcess) -> None:
    commit = bots_hub.add_repository("org/secret", checkpoint(), private=True)
    process.close()
    process._token = None
    with pytest.raises(ScanFailed, match="no such repository, or it is private"):
        scan(process, "org/secret", commit)


def test_a_process_that_does_not_start_is_nobodys_fault(process: ScanProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    process.close()
    monkeypatch.setattr("optimum_qguard.hub.bot.scanner._START_LIMIT", 0.1)
    with pytest.raises(ScannerUnavailable, match="the scanning process does not start"):
        scan(process, "org/model", "0" * 40)


@pytest.mark.parametrize("named", [("org/other", "a" * 40), ("org/model", "b" * 40), ("org/model", None)])
def test_a_report_of_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, named: tuple[str, str | None]
) -> None:
    """The process may be in the hands of what it scans; what it sends decides where the bot posts."""
    model, revision = named
    report = ScanReport(model=model, revision=revision, verdict="clean", reason="x").model_dump(mode="json")
    ours, theirs = Pipe()
    scanning = ScanProcess(Limits(seconds=3, memory=64 << 20))
    monkeypatch.setattr(scanning, "_start", lambda _: setattr(scanning, "_connection", ours))
    theirs.send_bytes(json.dumps({"report": report}).encode())
    with pytest.raises(ScanFailed, match="report of something else"):
        scan(scanning, "org/model", "a" * 40)
    assert ours.closed
