"""What an engine is, and the register of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from optimum_qguard.checkpoint.repository import Repository
from optimum_qguard.registry import Registry
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.work import Result, Task


class Engine(Protocol):
    """Does all tasks of one repository, in any order, and yields each one's result."""

    def __call__(self, tasks: Iterable[Task], repository: Repository, workers: int) -> Iterator[Result]: ...


_REGISTRY: Registry[Engine] = Registry("engine", "optimum_qguard.scan.engines", ScanError)


def register(name: str, engine: Engine) -> None:
    """Make an engine known by name. Called at the end of each engine's file."""
    _REGISTRY.add(name, engine)
