"""Takes jobs from the queue, has them scanned, and posts the reports."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from pydantic import ValidationError

from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.hub.bot.errors import ScanFailed, ScannerUnavailable
from optimum_qguard.hub.bot.metrics import Metrics
from optimum_qguard.hub.bot.queue import Job, JobQueue
from optimum_qguard.hub.bot.scanner import Limits, ScanProcess
from optimum_qguard.hub.bot.settings import BotSettings
from optimum_qguard.scan.report import ScanReport

log = logging.getLogger("qguard.bot")

_IDLE = 1.0


class Posts(Protocol):
    """`Poster`, or `Printer` in a dry run."""

    def post(self, report: ScanReport) -> str | None: ...


class Workers:
    """So many threads, each with a process that scans."""

    def __init__(self, queue: JobQueue, settings: BotSettings, posts: Posts, metrics: Metrics, threads: int) -> None:
        """
        Args:
            threads: of each scan.
        """
        self._queue, self._settings, self._posts, self._metrics = queue, settings, posts, metrics
        self._limits = Limits(settings.time_limit, settings.memory_limit, threads)
        self._stop = threading.Event()
        self._wake = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"qguard-worker-{index}", daemon=True)
            for index in range(settings.workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Say that there is something in the queue."""
        with self._wake:
            self._wake.notify()

    def alive(self) -> int:
        """How many work."""
        return sum(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End all scans and give them back to the queue."""
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        process = ScanProcess(self._limits, self._settings.read_token)
        try:
            while not self._stop.is_set():
                try:
                    job = self._queue.claim()
                    if job is not None:
                        self._work(job, process)
                        continue
                except Exception:  # a full disk, for instance: the job stays in the queue file
                    log.exception("the queue cannot be read or written")
                with self._wake:
                    self._wake.wait(_IDLE)
        finally:
            process.close()

    def _work(self, job: Job, process: ScanProcess) -> None:
        try:
            if job.attempts > self._settings.attempts:
                raise ScanFailed(job.reason or "the bot itself ended while it worked on this")
            report = _stored(job) or self._scan(job, process)
        except ScanFailed as error:
            if self._stop.is_set():
                self._queue.give_back(job)
            else:
                self._failed(job, "scan", str(error))
            return
        except ScannerUnavailable:
            self._queue.give_back(job)
            if not self._stop.is_set():
                log.exception("nothing can be scanned")
                self._stop.wait(self._settings.retry_delay)
            return
        try:
            url = self._posts.post(report) if self._wanted(job, report) else None
        except Exception as error:
            self._failed(job, "post", " ".join(str(error).split()) or type(error).__name__)
        else:
            self._queue.finish(job, url)
            log.info("%s: %s%s", job.name, report.verdict, f", {url}" if url else "")

    def _wanted(self, job: Job, report: ScanReport) -> bool:
        return job.origin == "webhook" and (report.verdict == "suspicious" or not self._settings.only_findings)

    def _scan(self, job: Job, process: ScanProcess) -> ScanReport:
        start = time.perf_counter()
        report = process.scan(
            job.repository, job.revision, full=job.full, anonymous=job.origin == "page", stop=self._stop
        )
        self._metrics.scan_seconds.observe(time.perf_counter() - start)
        self._queue.keep_report(job, report.model_dump_json(), report.verdict)
        return report

    def _failed(self, job: Job, step: str, reason: str) -> None:
        reason = printable(reason)  # it may quote names in the repository
        self._metrics.failures.labels(step).inc()
        # Somebody waits at the page, and can ask again.
        attempts = 1 if job.origin == "page" else self._settings.attempts
        state = self._queue.retry(job, reason, attempts=attempts, delay=self._settings.retry_delay)
        log.warning("%s: %s failed (%s)%s", job.name, step, reason, "; given up" if state == "failed" else "")


def _stored(job: Job) -> ScanReport | None:
    """The report of a scan that was finished before; not one that another version wrote."""
    try:
        return None if job.report is None else ScanReport.model_validate_json(job.report)
    except ValidationError:
        return None
