"""What Prometheus sees of the bot."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from optimum_qguard.hub.bot.queue import JobQueue

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class _Jobs(Collector):
    """Read from the queue when they are asked for, so they survive a restart."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("qguard_bot_jobs", "Commits in the queue file, by state.", labels=["state"])
        for state, count in self._queue.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        verdicts = CounterMetricFamily("qguard_bot_verdicts", "Commits scanned, by verdict.", labels=["verdict"])
        for verdict, count in self._queue.verdicts().items():
            verdicts.add_metric([verdict], count)
        yield verdicts


class Metrics:
    """Counters of this process, and of the queue.

    Attributes:
        requests: to the webhook, by outcome.
        failures: attempts that failed, by what failed: the scan, or posting its report.
        scan_seconds: how long scans took.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(queue))
        self.requests = Counter(
            "qguard_bot_webhook_requests", "Webhook requests, by outcome.", ["outcome"], registry=self._registry
        )
        self.failures = Counter("qguard_bot_failures", "Attempts that failed.", ["step"], registry=self._registry)
        self.scan_seconds = Histogram(
            "qguard_bot_scan_seconds", "Seconds that scans took.", buckets=_SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self._registry)
