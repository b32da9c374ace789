"""Scans several repositories, some at a time; one that cannot be scanned does not keep the others from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from optimum_qguard.scan.detectors import get_detector
from optimum_qguard.scan.engines import get_engine
from optimum_qguard.scan.errors import ScanError, describe
from optimum_qguard.scan.report import ScanReport, failed_report
from optimum_qguard.scan.scanner import Progress, scan

AT_ONCE = 2
"""Repositories, if nobody says how many workers there are."""


def scan_many(
    models: Sequence[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    detectors: Sequence[str] | None = None,
    engine: str = "local",
    **options: Any,
) -> list[ScanReport]:
    """Reports of all models, in their order; ``"inconclusive"`` of one that cannot be opened or breaks the scan.

    Args:
        models: as `scan` takes them.
        workers: how many repositories at once; what is left over works on each one's tensors.
        progress: called with how many tensors of a single model are done and how many there are; of several models,
            how many models.
        detectors, engine, options: see `scan`.

    Raises:
        ScanError: unknown detector or engine, or the engine is not there.
        ImportError: what the engine needs is not installed.
    """
    for name in detectors or ():
        get_detector(name)
    get_engine(engine)
    at_once = max(1, min(workers or AT_ONCE, len(models)))
    single = len(models) == 1
    stopped = threading.Event()

    def scan_one(model: str) -> ScanReport:
        def report_progress(done: int, total: int) -> None:
            if stopped.is_set():
                raise ScanError("stopped")
            if single and progress is not None:
                progress(done, total)

        try:
            return scan(
                model,
                workers=None if workers is None else max(1, workers // at_once),
                progress=report_progress,
                detectors=detectors,
                engine=engine,
                **options,
            )
        except (ScanError, ImportError):
            raise
        except Exception as error:
            return failed_report(model, describe(error))

    if single:  # in this thread, so that Ctrl-C ends it at once
        return [scan_one(models[0])]
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(scan_one, model): index for index, model in enumerate(models)}
        reports: dict[int, ScanReport] = {}
        try:
            for future in as_completed(futures):
                reports[futures[future]] = future.result()
                if progress is not None and not single:
                    progress(len(reports), len(models))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [reports[index] for index in range(len(models))]
