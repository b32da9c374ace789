"""What quantizers make of a protected checkpoint, beside what they make of its original: the collapse matrix.

>>> from optimum_qguard.evaluate.collapse import collapse
>>> rows = collapse("encrypted", "original", ["bnb-int8"])   # doctest: +SKIP
>>> rows[1].protected.kl, rows[1].original.kl                # doctest: +SKIP
(36.1, 0.005)
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.evaluation import DEFAULT_TASKS, check_options, check_tasks
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.task import Task
from optimum_qguard.formats import WeightError
from optimum_qguard.formats.gguf_mixture import FILE_TYPES
from optimum_qguard.guard.architecture import refuse_quantized
from optimum_qguard.guard.backends import backends, require
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPARING = "perplexity"
_BY_ARITHMETIC = ("mxfp4", "nvfp4")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """One model in one format.

    Attributes:
        figures: by task and name, NaN and infinity as they are; empty if the quantizer refused the model.
        refusal: what the quantizer said, in one line.
    """

    figures: Mapping[str, Mapping[str, float]]
    refusal: str | None = None

    @property
    def kl(self) -> float | None:
        """KL divergence from the reference at full precision in nats per token; ``None`` if refused."""
        return self.figures[_COMPARING]["kl"] if _COMPARING in self.figures else None

    @property
    def status(self) -> str:
        """``"measured"``, ``"refused: …"``, or which figures are not finite: ``"kl is NaN"``."""
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        not_finite = [
            f"{name} is {'NaN' if math.isnan(value) else 'infinite'}"
            for figures in self.figures.values()
            for name, value in figures.items()
            if not math.isfinite(value)
        ]
        return ", ".join(not_finite) or "measured"

    def as_json(self) -> dict[str, Any]:
        """``status`` and ``figures``, those that are not finite as ``None``."""
        figures = {
            task: {name: value if math.isfinite(value) else None for name, value in found.items()}
            for task, found in self.figures.items()
        }
        return {"status": self.status, "figures": figures}


@dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
        format: ``None``: full precision.
        original: the reference in it; ``None`` if the model was compared with itself.
        protected: the model in it.
    """

    format: str | None
    original: Cell | None
    protected: Cell

    @property
    def cells(self) -> dict[str, Cell]:
        """Those that there are, by name, the original first."""
        both = {"original": self.original, "protected": self.protected}
        return {name: cell for name, cell in both.items() if cell is not None}


def collapse(
    model: str | Path,
    reference: str | Path | None = None,
    formats: Sequence[str] | None = None,
    *,
    tasks: Sequence[str] = DEFAULT_TASKS,
    progress: Progress | None = None,
    **options: Any,
) -> list[Row]:
    """Quantize a model and its original to each format, and compare both with the original at full precision.

    A format whose quantizer refuses the model is a row that says so: no error.

    Args:
        model: a folder, or a Hub id with optional ``@revision``; full precision.
        reference: the original; by default the model is its own.
        formats: see `known_formats`; by default `installed_formats`.
        tasks: see `task_names`; ``"perplexity"``, which gives KL divergence, is always among them.
        progress: called with how many models are done and of how many.
        options: see `Options`.

    Returns:
        A row of full precision, then one for each format.

    Raises:
        CheckpointError: a model cannot be read.
        QGuardConfigError: an unknown format, or its library is not installed.
        QGuardError: a model is quantized already, or of an architecture that is not known.
        EvaluationError: no formats, an unknown task or option, or a model that does not run at full precision.
    """
    chosen = list(dict.fromkeys(installed_formats() if formats is None else formats))
    if not chosen:
        raise EvaluationError("no formats: at least one is needed")
    checked = check_options(options)
    measured = check_tasks(tuple(dict.fromkeys((_COMPARING, *tasks))), checked, compared=True)
    models = [model] if reference is None else [reference, model]
    for each in models:
        reader = open_checkpoint(each)
        refuse_quantized(reader)
        for name in chosen:
            with contextlib.suppress(WeightError):  # what it refuses is a row
                find_targets(reader, name)
    tokenizer = load_tokenizer(models[0])
    standard = Behaviour(load_model(models[0]), tokenizer, checked)
    rows: list[Row] = []
    in_order: list[str | None] = [None, *chosen]
    for step, format in enumerate(in_order):
        cells = []
        for index, each in enumerate(models):
            if progress is not None:
                progress(step * len(models) + index, len(in_order) * len(models))
            if format is None:
                loaded = standard.model if index == 0 else load_model(each)
                cells.append(measure(loaded, tokenizer, measured, standard))
                del loaded
            else:
                cells.append(measure_or_refuse(_loader(each, format), tokenizer, measured, standard))
        rows.append(Row(format, None if reference is None else cells[0], cells[-1]))
    return rows


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task], reference: Behaviour) -> Cell:
    """What the tasks find of a loaded model, on the reference's text and prompts."""
    subject = Behaviour(model, tokenizer, reference.options)
    return Cell({name: dict(task.measure(subject, reference)) for name, task in tasks.items()})


def measure_or_refuse(
    load: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    reference: Behaviour,
) -> Cell:
    """The same for a model that ``load`` quantizes. Whatever the library raises, while it quantizes or when the model
    runs, is its refusal: how a library fails on weights that it was not made for is not documented."""
    try:
        return measure(load(), tokenizer, tasks, reference)
    except Exception as error:
        return Cell({}, " ".join(str(error).split()) or type(error).__name__)


def installed_formats() -> list[str]:
    """Every format whose library is installed, sorted: the libraries' presets, GGUF's file types, MXFP4 and NVFP4."""
    found = list(_BY_ARITHMETIC)
    for backend in backends():
        with contextlib.suppress(QGuardConfigError):
            require(backend)
            found += backend.presets
    if all(importlib.util.find_spec(package) for package in ("gguf", "libgguf")):
        found += [f"gguf-{name}" for name in FILE_TYPES]
    return sorted(found)


def _loader(model: str | Path, format: str) -> Callable[[], Any]:
    return lambda: load_model(model, format)
