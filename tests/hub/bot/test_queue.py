"""The queue file."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum_qguard.hub.bot.errors import BotError
from optimum_qguard.hub.bot.queue import JobQueue

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.sqlite"


@pytest.fixture
def queue(path: Path) -> Iterator[JobQueue]:
    opened = JobQueue(path)
    yield opened
    opened.close()


def test_a_commit_is_queued_once(queue: JobQueue) -> None:
    number, new = queue.add("org/model", COMMIT)
    assert new
    assert queue.add("org/model", COMMIT) == (number, False)
    assert queue.add("org/other", COMMIT)[1]
    job = queue.claim()
    assert job is not None
    assert (job.id, job.repository, job.revision, job.attempts, job.full) == (number, "org/model", COMMIT, 1, False)
    queue.keep_report(job, "{}", "clean")
    queue.finish(job, "https://hub/1")
    assert queue.add("org/model", COMMIT) == (number, False)
    done = queue.get(number)
    assert done is not None
    assert (done.state, done.verdict, done.url) == ("done", "clean", "https://hub/1")


def test_visitors_may_ask_again_and_take_turns_with_webhooks(queue: JobQueue) -> None:
    queue.add("org/model", COMMIT)
    first, _ = queue.add("org/model", COMMIT, full=True, origin="page")
    second, new = queue.add("org/model", COMMIT, origin="page")
    assert new
    assert queue.ahead(first) == 0
    assert queue.ahead(second) == 1
    assert queue.count("queued", "page") == 2
    claimed = [queue.claim() for _ in range(4)]
    assert [None if job is None else (job.id, job.origin) for job in claimed] == [
        (first, "page"),
        (1, "webhook"),
        (second, "page"),
        None,
    ]


def test_nothing_is_claimed_twice(queue: JobQueue) -> None:
    for index in range(200):
        queue.add(f"org/model-{index}", COMMIT)
    claimed: list[int] = []

    def work() -> None:
        while (job := queue.claim()) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 201))


def test_what_ran_when_the_bot_ended_is_queued_again_with_its_report(path: Path) -> None:
    queue = JobQueue(path)
    queue.add("org/scanned", COMMIT)
    queue.add("org/not-yet", COMMIT)
    scanned = queue.claim()
    assert scanned is not None
    assert queue.claim() is not None
    queue.keep_report(scanned, '{"verdict": "clean"}', "clean")
    queue.close()
    queue = JobQueue(path)
    assert queue.counts() == {"queued": 2, "running": 0, "done": 0, "failed": 0}
    again = queue.claim()
    assert again is not None
    assert (again.repository, again.report) == ("org/scanned", '{"verdict": "clean"}')
    other = queue.claim()
    assert other is not None
    assert (other.repository, other.report, other.attempts) == ("org/not-yet", None, 2)
    queue.close()


def test_retries_wait_longer_each_time_and_end(queue: JobQueue, path: Path) -> None:
    number, _ = queue.add("org/model", COMMIT)
    waits = []
    for attempt in range(3):
        job = queue.claim()
        assert job is not None
        assert job.attempts == attempt + 1
        before = time.time()
        state = queue.retry(job, f"reason {attempt}", attempts=3, delay=100)
        assert state == ("failed" if attempt == 2 else "queued")
        assert queue.claim() is None
        with sqlite3.connect(path) as connection:
            waits.append(connection.execute("SELECT next_try FROM jobs").fetchone()[0] - before)
            connection.execute("UPDATE jobs SET next_try = 0")
    assert waits == pytest.approx([100, 200, 400], abs=5)
    failed = queue.get(number)
    assert failed is not None
    assert (failed.state, failed.reason) == ("failed", "reason 2")
    assert queue.claim() is None
    # Sent again, it is tried again.
    assert queue.add("org/model", COMMIT) == (number, True)
    job = queue.claim()
    assert job is not None
    assert job.attempts == 1


def test_given_back_it_has_lost_no_attempt(queue: JobQueue) -> None:
    queue.add("org/model", COMMIT)
    for _ in range(5):
        job = queue.claim()
        assert job is not None
        assert job.attempts == 1
        queue.give_back(job)


def test_old_reports_are_dropped_but_not_that_they_were_scanned(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_qguard.hub.bot.queue._REPORTS_KEPT", 2)
    for index in range(4):
        queue.add(f"org/model-{index}", COMMIT)
        job = queue.claim()
        assert job is not None
        queue.keep_report(job, "{}", "clean")
        queue.finish(job)
    reports = [job.report for number in range(1, 5) if (job := queue.get(number)) is not None]
    assert reports == [None, None, "{}", "{}"]
    assert queue.verdicts() == {"clean": 4}
    assert not queue.add("org/model-0", COMMIT)[1]


def test_the_file_is_for_its_owner_only(queue: JobQueue, path: Path) -> None:
    queue.add("org/model", COMMIT)
    files = sorted(path.parent.iterdir())
    assert len(files) >= 3  # with the log and the lock
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_an_event_is_on_the_disk_when_add_returns(path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from optimum_qguard.hub.bot.queue import JobQueue\n"
        f"queue = JobQueue(Path(sys.argv[1])); queue.add('org/model', '{COMMIT}')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    queue = JobQueue(path)
    job = queue.claim()
    queue.close()
    assert job is not None
    assert job.name == f"org/model@{COMMIT}"


def test_one_bot_at_a_time(queue: JobQueue, path: Path) -> None:
    with pytest.raises(BotError, match=r"another bot works with this queue"):
        JobQueue(path)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all" * 100)
    with pytest.raises(BotError, match=r"the queue cannot be written here \(File exists\)"):
        JobQueue(tmp_path / "text" / "queue.sqlite")
    with pytest.raises(BotError, match=r"cannot be used as the bot's queue \(file is not a database\)"):
        JobQueue(tmp_path / "text")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(BotError, match=r"is no queue of this version \(1\)"):
        JobQueue(other)
    with sqlite3.connect(tmp_path / "foreign.sqlite") as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(BotError, match="is no queue of this version"):
        JobQueue(tmp_path / "foreign.sqlite")
