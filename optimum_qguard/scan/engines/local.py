"""Threads of this process: reading and torch's kernels let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from optimum_qguard.checkpoint.repository import Repository
from optimum_qguard.scan.engine import register
from optimum_qguard.scan.work import Result, Task, work


def run(tasks: Iterable[Task], repository: Repository, workers: int) -> Iterator[Result]:
    """See `Engine`."""
    if workers == 1:
        yield from (work(task, repository) for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, task, repository) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            repository.close()  # so that those that are at work end soon
            raise
        finally:
            pool.shutdown(cancel_futures=True)


register("local", run)
