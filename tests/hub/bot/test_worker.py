"""What workers do with reports. What they do with repositories is in test_bot.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard.hub.bot.errors import ScanFailed, ScannerUnavailable
from optimum_qguard.hub.bot.metrics import Metrics
from optimum_qguard.hub.bot.queue import Job, JobQueue, Origin
from optimum_qguard.hub.bot.scanner import ScanProcess
from optimum_qguard.hub.bot.settings import BotSettings
from optimum_qguard.hub.bot.worker import Workers
from optimum_qguard.scan.report import ScanReport

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Posts:
    """Remembers what it was given, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.posted: list[str] = []

    def post(self, report: ScanReport) -> str | None:
        if self.failures:
            self.failures -= 1
            raise OSError("the Hub is away")
        self.posted.append(report.model)
        return f"https://hub/{report.model}"


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    opened = JobQueue(tmp_path / "queue.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def work(queue: JobQueue, tmp_path: Path) -> Callable[..., Posts]:
    """Runs two workers until nothing is left to do."""

    def run(failures: int = 0, **settings: Any) -> Posts:
        posts = Posts(failures)
        options = {"secret": "x" * 16, "queue": tmp_path, "dry_run": True, "workers": 2, "retry_delay": 0.01}
        workers = Workers(queue, BotSettings(**{**options, **settings}), posts, Metrics(queue), threads=1)
        workers.start()
        assert workers.alive() == 2
        end = time.monotonic() + 30
        while (counts := queue.counts())["queued"] or counts["running"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        workers.stop()
        assert workers.alive() == 0
        return posts

    return run


def add(queue: JobQueue, repository: str, verdict: str | None, origin: Origin = "webhook") -> int:
    """A job; with a verdict it has been scanned already, and the bot was ended before it posted the report."""
    number, _ = queue.add(repository, COMMIT, origin=origin)
    if verdict is not None:
        report = ScanReport.model_validate(
            {"model": repository, "revision": COMMIT, "verdict": verdict, "reason": "because"}
        )
        job = queue.get(number)
        assert job is not None
        queue.keep_report(job, report.model_dump_json(), verdict)
    return number


def job(queue: JobQueue, number: int) -> Job:
    found = queue.get(number)
    assert found is not None
    return found


def test_all_verdicts_are_posted_but_what_visitors_asked_for(queue: JobQueue, work: Callable[..., Posts]) -> None:
    numbers = [add(queue, f"org/{verdict}", verdict) for verdict in ("clean", "suspicious", "inconclusive", "skipped")]
    visitor = add(queue, "org/visited", "suspicious", "page")
    posts = work()
    assert sorted(posts.posted) == ["org/clean", "org/inconclusive", "org/skipped", "org/suspicious"]
    assert [job(queue, number).url for number in numbers][:1] == ["https://hub/org/clean"]
    assert (job(queue, visitor).state, job(queue, visitor).url) == ("done", None)


def test_only_findings(queue: JobQueue, work: Callable[..., Posts]) -> None:
    for verdict in ("clean", "suspicious", "inconclusive", "skipped"):
        add(queue, f"org/{verdict}", verdict)
    assert work(only_findings=True).posted == ["org/suspicious"]
    assert queue.counts()["done"] == 4


def test_posting_is_tried_again_and_given_up(queue: JobQueue, work: Callable[..., Posts]) -> None:
    number = add(queue, "org/model", "suspicious")
    # The bot's end was the first attempt.
    assert work(failures=2, attempts=4).posted == ["org/model"]
    other = add(queue, "org/other", "suspicious")
    assert work(failures=3, attempts=4).posted == []
    assert job(queue, number).state == "done"
    assert (job(queue, other).state, job(queue, other).reason) == ("failed", "the Hub is away")


def test_what_has_ended_the_bot_again_and_again_is_given_up(
    tmp_path: Path, queue: JobQueue, work: Callable[..., Posts]
) -> None:
    number = add(queue, "org/killer", None)
    for _ in range(2):  # claimed, and then the bot was killed
        assert queue.claim() is not None
        queue._prepare(tmp_path)
    assert work(attempts=2).posted == []
    assert job(queue, number).state == "failed"
    assert job(queue, number).reason == "the bot itself ended while it worked on this"


def test_commits_wait_while_nothing_can_be_scanned(
    queue: JobQueue, work: Callable[..., Posts], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = add(queue, "org/model", None)
    failures = iter([ScannerUnavailable("no memory")] * 5 + [ScanFailed("it is gone")] * 2)

    def scan(*_: Any, **__: Any) -> ScanReport:
        raise next(failures)

    monkeypatch.setattr(ScanProcess, "scan", scan)
    work(attempts=2)
    assert (job(queue, number).state, job(queue, number).attempts) == ("failed", 2)
    assert job(queue, number).reason == "it is gone"
    assert list(failures) == []


def test_a_report_of_another_version_is_made_anew(
    queue: JobQueue, work: Callable[..., Posts], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = add(queue, "org/model", None)
    queue.keep_report(job(queue, number), '{"schema_version": 99}', "clean")
    scanned = ScanReport(model="org/model", revision=COMMIT, verdict="suspicious", reason="because")
    monkeypatch.setattr(ScanProcess, "scan", lambda *_, **__: scanned)
    assert work().posted == ["org/model"]
    assert job(queue, number).verdict == "suspicious"


def test_reasons_cannot_write_on_a_terminal(
    queue: JobQueue, work: Callable[..., Posts], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def scan(*_: Any, **__: Any) -> ScanReport:
        raise ScanFailed("a\x1b[2J\nb")

    number = add(queue, "org/model", None)
    monkeypatch.setattr(ScanProcess, "scan", scan)
    work(attempts=1)
    assert "\x1b" not in caplog.text
    assert "\x1b" not in (job(queue, number).reason or "\x1b")
