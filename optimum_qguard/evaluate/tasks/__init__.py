"""The tasks of `evaluate`, one file each, found by themselves.

A task is a file here that defines a `Task` and calls `register` for each name that it goes by.
"""

from __future__ import annotations

from optimum_qguard.evaluate.task import _REGISTRY, Task

__all__ = ["get_task", "task_names"]


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return _REGISTRY.names()


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        EvaluationError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.look_up(name)()
