"""The tasks of `evaluate`, one file each, found by themselves.

A task is a file here that defines a `Task` and calls `register` for each name that it goes by.
"""

from __future__ import annotations

import importlib
import pkgutil

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.task import _REGISTRY, Task

__all__ = ["get_task", "task_names"]


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        EvaluationError: unknown name; the message lists the known ones.
    """
    _discover()
    if name not in _REGISTRY:
        raise EvaluationError(f"unknown task {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]()
