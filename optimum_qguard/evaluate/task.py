"""What a task is, and the register of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.dataset import parse_source
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.options import Options
from optimum_qguard.registry import Registry


class Task(ABC):
    """One thing to measure.

    Attributes:
        needs_reference: whether it compares with another model.
    """

    needs_reference: ClassVar[bool] = False

    def check(self, options: Options) -> None:
        """Raise `EvaluationError` or ImportError if it cannot run; asked of every task before the first one runs."""

    @abstractmethod
    def measure(self, subject: Behaviour, reference: Behaviour | None) -> Mapping[str, float]:
        """The figures by name."""


_REGISTRY: Registry[Callable[[], Task]] = Registry("task", "optimum_qguard.evaluate.tasks", EvaluationError)


def register(name: str, factory: Callable[[], Task]) -> None:
    """Make a task known by name. Called at the end of each task's file."""
    _REGISTRY.add(name, factory)


def source_of(name: str, options: Options) -> tuple[str, str | None, str | None]:
    """The data set that was given for a task that has none of its own: source, configuration and split.

    Raises:
        EvaluationError: none was given.
    """
    if name not in options.data:
        raise EvaluationError(f"the task {name} needs a data set; give it as data={{{name!r}: SOURCE}}")
    return parse_source(options.data[name])
