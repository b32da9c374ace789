"""One entry point to everything measured here.

>>> from optimum_qguard.evaluate.evaluation import evaluate
>>> found = evaluate(model, tokenizer, tasks=("perplexity",), reference=original)   # doctest: +SKIP
>>> found["perplexity"]["kl"]                                                       # doctest: +SKIP
0.33
>>> found.model_dump_json()                                                         # doctest: +SKIP
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimum_qguard import __version__
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.task import Task
from optimum_qguard.evaluate.tasks import get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TASKS = ("perplexity", "degeneration")


class TaskResult(BaseModel):
    """What one task measured.

    Attributes:
        figures: by name; ``None`` for one that is not finite.
        seconds: how long it took. Answers that several tasks look at count for the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    figures: dict[str, float | None]
    seconds: float = Field(ge=0)


class Evaluation(BaseModel):
    """Everything measured of one model.

    Attributes:
        schema_version: of this layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: its name or path.
        reference: that of the model that it was compared with, if any.
        options: what it was measured on; a text or prompts of one's own are not in it.
        results: by task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    package_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    model: str
    reference: str | None
    options: Options
    results: dict[str, TaskResult]

    def __getitem__(self, task: str) -> dict[str, float | None]:
        """The figures of one task."""
        return self.results[task].figures


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = DEFAULT_TASKS,
    reference: PreTrainedModel | Behaviour | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model.

    Args:
        model: a causal language model, quantized or not.
        tokenizer: its tokenizer, and the reference's.
        tasks: names of tasks, see `task_names`.
        reference: what the tasks that compare compare with. A `Behaviour` with the same options keeps what it said, for
            several models to be compared with it.
        progress: called with how many tasks are done and of how many.
        options: see `Options`.

    Raises:
        EvaluationError: no tasks, an unknown task or option, or something that a task needs was not given.
        ImportError: a task needs a package that is not installed.
    """
    chosen = check_options(options)
    checked = check_tasks(tasks, chosen, compared=reference is not None)
    if reference is not None and not isinstance(reference, Behaviour):
        reference = Behaviour(reference, tokenizer, chosen)
    if reference is not None and reference.options != chosen:
        raise EvaluationError("the reference was asked with other options; give it the same")
    subject = Behaviour(model, tokenizer, chosen)
    results: dict[str, TaskResult] = {}
    for name, task in checked.items():
        if progress is not None:
            progress(len(results), len(checked))
        start = time.perf_counter()
        figures = task.measure(subject, reference)
        finite = {figure: value if math.isfinite(value) else None for figure, value in figures.items()}
        results[name] = TaskResult(figures=finite, seconds=time.perf_counter() - start)
    return Evaluation(
        model=model.name_or_path,
        reference=None if reference is None else reference.model.name_or_path,
        options=chosen,
        results=results,
    )


def check_options(options: dict[str, Any]) -> Options:
    """`Options` of keyword arguments; raises `EvaluationError` in one line."""
    try:
        return Options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EvaluationError(
            f"option {where}: {first['msg']}; options are {', '.join(Options.model_fields)}"
        ) from None


def check_tasks(tasks: Sequence[str], options: Options, *, compared: bool) -> dict[str, Task]:
    """The tasks by name; raises what `evaluate` raises before it measures anything."""
    if not tasks:
        raise EvaluationError("no tasks: at least one is needed")
    found = {name: get_task(name) for name in tasks}
    for name, task in found.items():
        if task.needs_reference and not compared:
            raise EvaluationError(f"the task {name} compares with a reference model; give one")
        task.check(options)
    for name in options.data.keys() - found.keys():
        raise EvaluationError(f"a data set is given for {name}, which is none of the tasks {', '.join(found)}")
    return found
