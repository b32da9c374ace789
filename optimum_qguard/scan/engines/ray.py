"""Tasks of a Ray cluster that is running already; a task whose worker dies is done again by another one.

Each worker opens the repository itself, so folders must lie at the same path on every node.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.repository import Repository, open_repository
from optimum_qguard.scan.engine import register
from optimum_qguard.scan.errors import ScanError, describe
from optimum_qguard.scan.work import Result, Task, work

RETRIES = 5
"""Workers that a task may lose."""

_START = "start one with ray start --head, or set RAY_ADDRESS to the address of one"
_LOCK = threading.Lock()


def run(tasks: Iterable[Task], repository: Repository, workers: int) -> Iterator[Result]:
    """See `Engine`; ``workers`` is how many tasks there are at a time.

    Raises:
        ScanError: there is no cluster.
        ImportError: Ray is not installed.
    """
    ray = connect()
    is_local = repository.local_folder is not None
    remote_work = ray.remote(max_retries=RETRIES, num_cpus=1)(_work)
    waiting = iter(tasks)
    running: list[Any] = []
    try:
        while True:
            for task in waiting:
                running.append(remote_work.remote(_absolute(task) if is_local else task))
                if len(running) >= workers:
                    break
            if not running:
                return
            done, running = ray.wait(running)
            result: Result = _get(ray, done[0])
            repository.count(result.bytes_read)
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)


def connect() -> Any:
    """Ray, connected to the cluster that ``RAY_ADDRESS`` names or that runs on this machine.

    Raises:
        ScanError: there is none.
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'optimum-qguard[ray]'") from error
    with _LOCK:  # several repositories may be scanned at once
        if ray.is_initialized():
            return ray
        _check_address()
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ScanError(
                f"no Ray cluster ({describe(error)}): {_START}; RAY_AUTH_MODE=token if it asks for a token"
            ) from error
    return ray


def _check_address() -> None:
    """Ray itself waits a minute for a cluster that is not there."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ScanError(f"no Ray cluster at {address}, which RAY_ADDRESS names: {_START}") from error


def _absolute(task: Task) -> Task:
    """Workers have working directories of their own."""
    return replace(task, model=str(Path(task.model).absolute()))


def _get(ray: Any, reference: Any) -> Result:
    try:
        result: Result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what it raised, without the worker's traceback
    return result


def _work(task: Task) -> Result:
    return work(task, _opened(task.model, task.revision) if task.revision else open_repository(task.model))


@functools.lru_cache(maxsize=4)
def _opened(model: str, revision: str) -> Repository:
    """A commit never changes, and listing it is a request."""
    return open_repository(model, revision=revision)


register("ray", run)
