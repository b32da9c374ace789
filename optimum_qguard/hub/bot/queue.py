"""What is to be scanned and what was, in one SQLite file, so that neither a crash nor a restart loses any of it."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from optimum_qguard.hub.bot.errors import BotError

State = Literal["queued", "running", "done", "failed"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed")
Origin = Literal["webhook", "page"]

MOST_QUEUED = 100_000
"""Webhook events that may wait; each takes about 200 bytes."""

_VERSION = 1
_REPORTS_KEPT = 1000
_LONGEST_DELAY = 3600.0
_LONGEST_REASON = 500
_SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    repository TEXT NOT NULL,
    revision TEXT NOT NULL,
    full INTEGER NOT NULL,
    origin TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL,
    created REAL NOT NULL,
    finished REAL,
    report TEXT,
    verdict TEXT,
    reason TEXT,
    url TEXT
);
CREATE UNIQUE INDEX webhooks ON jobs (repository, revision) WHERE origin = 'webhook';
CREATE INDEX waiting ON jobs (state, next_try);
"""


@dataclass(frozen=True)
class Job:
    """One commit to scan.

    Attributes:
        id: in the queue.
        repository, revision: what, and at which commit.
        full: look at every weight.
        origin: who asked. What a visitor of the page names is scanned without a token, and nothing is posted.
        state: see `STATES`.
        attempts: so far, this one included.
        report: as JSON, once the scan is done; then only posting is left.
        verdict: of the report.
        reason: why the last attempt failed.
        url: where the report was posted.
    """

    id: int
    repository: str
    revision: str
    full: bool
    origin: Origin
    state: State
    attempts: int
    report: str | None
    verdict: str | None
    reason: str | None
    url: str | None

    @property
    def name(self) -> str:
        """As it is named on the command line."""
        return f"{self.repository}@{self.revision}"


_COLUMNS = ", ".join(Job.__dataclass_fields__)


class JobQueue:
    """See the module. Used by one process, by any of its threads.

    What was running when the last process ended is queued again. A finished report is stored before it is posted, so
    a commit is scanned once even if the process ends in between.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it, for its owner only.

        Raises:
            BotError: it cannot be written, is no queue or one of another version, or another process uses it.
        """
        self._lock = threading.RLock()
        self._last: Origin = "webhook"
        self._file_lock = FileLock(f"{path}.lock", timeout=0, mode=0o600)
        try:
            self._file_lock.acquire()
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except Timeout as error:
            raise BotError(f"{path}: another bot works with this queue; give this one its own by --queue") from error
        except OSError as error:
            raise BotError(f"{path}: the queue cannot be written here ({error.strerror or error})") from error
        try:
            self._connection.row_factory = sqlite3.Row
            self._prepare(path)
        except sqlite3.Error as error:
            self.close()
            raise BotError(f"{path}: cannot be used as the bot's queue ({error})") from error
        except BotError:
            self.close()
            raise

    def _prepare(self, path: Path) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != _VERSION and (version or tables):
            raise BotError(f"{path}: is no queue of this version ({_VERSION}); move it away or give another --queue")
        self._connection.execute("PRAGMA journal_mode = WAL")
        # A request is answered only once its event is on the disk.
        self._connection.execute("PRAGMA synchronous = FULL")
        if version != _VERSION:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT")
        with self._transaction() as connection:
            # An attempt that a crash cut short is not the repository's fault unless it happens again and again.
            connection.execute("UPDATE jobs SET state = 'queued', next_try = 0 WHERE state = 'running'")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def add(
        self, repository: str, revision: str, *, full: bool = False, origin: Origin = "webhook"
    ) -> tuple[int, bool]:
        """Queue a commit. One that a webhook named before is not queued again, unless it was given up.

        Returns:
            The job's number, and whether it is new.
        """
        now = time.time()
        with self._transaction() as connection:
            if origin == "webhook":
                known = connection.execute(
                    "SELECT id, state FROM jobs WHERE origin = 'webhook' AND repository = ? AND revision = ?",
                    (repository, revision),
                ).fetchone()
                if known is not None and known["state"] == "failed":
                    connection.execute(
                        "UPDATE jobs SET state = 'queued', attempts = 0, next_try = ? WHERE id = ?", (now, known["id"])
                    )
                if known is not None:
                    return known["id"], known["state"] == "failed"
            cursor = connection.execute(
                "INSERT INTO jobs (repository, revision, full, origin, state, next_try, created)"
                " VALUES (?, ?, ?, ?, 'queued', ?, ?)",
                (repository, revision, full, origin, now, now),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid, True

    def claim(self) -> Job | None:
        """Take the next job whose time has come: by turns from the page and from webhooks, so that neither can keep the
        other waiting."""
        with self._transaction() as connection:
            row = connection.execute(
                f"UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE id = (SELECT id FROM jobs WHERE"  # noqa: S608
                f" state = 'queued' AND next_try <= ? ORDER BY origin = ?, next_try, id LIMIT 1)"
                f" RETURNING {_COLUMNS}",
                (time.time(), self._last),
            ).fetchone()
        if row is None:
            return None
        self._last = row["origin"]
        return _job(row)

    def keep_report(self, job: Job, report: str, verdict: str) -> None:
        """Store what the scan found. Attempts count anew, now for posting it."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET report = ?, verdict = ?, attempts = 1, reason = NULL WHERE id = ?",
                (report, verdict, job.id),
            )

    def finish(self, job: Job, url: str | None = None) -> None:
        """Done. Old reports are dropped; that these commits were scanned is remembered."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'done', finished = ?, url = ? WHERE id = ?", (time.time(), url, job.id)
            )
            connection.execute(
                "UPDATE jobs SET report = NULL WHERE state = 'done' AND report IS NOT NULL AND id <= ?",
                (job.id - _REPORTS_KEPT,),
            )

    def give_back(self, job: Job) -> None:
        """Queue it as if it had not been claimed."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'queued', next_try = 0, attempts = attempts - 1 WHERE id = ?", (job.id,)
            )

    def retry(self, job: Job, reason: str, *, attempts: int, delay: float) -> State:
        """Queue it again for later, or give it up.

        Args:
            reason: why this attempt failed.
            attempts: after how many it is given up.
            delay: seconds before the second attempt; doubled for each further one, up to an hour.
        """
        with self._transaction() as connection:
            row = connection.execute("SELECT attempts FROM jobs WHERE id = ?", (job.id,)).fetchone()
            now = time.time()
            state: State = "failed" if row["attempts"] >= attempts else "queued"
            wait = min(delay * 2 ** min(row["attempts"] - 1, 32), _LONGEST_DELAY)
            connection.execute(
                "UPDATE jobs SET state = ?, reason = ?, next_try = ?, finished = ? WHERE id = ?",
                (state, reason[:_LONGEST_REASON], now + wait, now if state == "failed" else None, job.id),
            )
        return state

    def get(self, id: int) -> Job | None:
        """A job by its number."""
        with self._lock:
            row = self._connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (id,)).fetchone()  # noqa: S608
        return None if row is None else _job(row)

    def ahead(self, id: int) -> int:
        """How many jobs that were asked for in the same way are before this one, and how many are running."""
        with self._lock:
            return int(
                self._connection.execute(
                    "SELECT count(*) FROM jobs AS other, jobs AS this WHERE this.id = ? AND (other.state = 'running' OR"
                    " (other.state = 'queued' AND other.id < this.id AND other.origin = this.origin)) AND"
                    " other.id <> this.id",
                    (id,),
                ).fetchone()[0]
            )

    def count(self, state: State, origin: Origin) -> int:
        """How many jobs of an origin are in a state."""
        with self._lock:
            return int(
                self._connection.execute(
                    "SELECT count(*) FROM jobs WHERE state = ? AND origin = ?", (state, origin)
                ).fetchone()[0]
            )

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state, all at one moment."""
        with self._lock:
            rows = self._connection.execute("SELECT state, count(*) AS n FROM jobs GROUP BY state").fetchall()
        found = {row["state"]: row["n"] for row in rows}
        return {state: found.get(state, 0) for state in STATES}

    def verdicts(self) -> dict[str, int]:
        """How many of the jobs that are done have which verdict."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT verdict, count(*) AS n FROM jobs WHERE state = 'done' GROUP BY verdict"
            ).fetchall()
        return {row["verdict"]: row["n"] for row in rows}

    def close(self) -> None:
        """Close the file; another process may open it then."""
        with self._lock:
            self._connection.close()
            self._file_lock.release()


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    return Job(**{**values, "full": bool(values["full"])})
