"""The collapse matrix in a model card: ``model-index`` results, one for each format and task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from optimum_qguard.checkpoint import CheckpointError

SOURCE = {"name": "optimum-qguard", "url": "https://pypi.org/project/optimum-qguard/"}
FULL_PRECISION = "full precision"

_NAMES = {"kl": "KL divergence from full precision, nats per token", "perplexity": "Perplexity"}


class CollapseCell(BaseModel):
    """One model in one format: ``figures`` by task and name, ``None`` where they are not finite."""

    model_config = ConfigDict(frozen=True)

    status: str
    figures: dict[str, dict[str, float | None]]


class CollapseRow(BaseModel):
    """One format (``None``: full precision): the model, and its original if it was measured beside it."""

    model_config = ConfigDict(frozen=True)

    format: str | None
    original: CollapseCell | None = None
    protected: CollapseCell


class CollapseFile(BaseModel):
    """What ``qguard collapse --json`` prints."""

    model_config = ConfigDict(frozen=True)

    rows: list[CollapseRow]

    @property
    def statuses(self) -> dict[str, str]:
        """By format: ``"measured"``, ``"refused"``, or which figures are not finite."""
        return {row.format or FULL_PRECISION: row.protected.status.partition(":")[0] for row in self.rows}


def read_collapse(path: str | Path) -> CollapseFile:
    """Read the file of ``qguard collapse --json``.

    Raises:
        CheckpointError: there is none, or it is another.
    """
    path = Path(path).expanduser()
    try:
        return CollapseFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(
            f"{path}: not what qguard collapse --json prints ({where + ': ' if where else ''}{problem['msg']})"
        ) from error


def collapse_results(collapse: CollapseFile) -> list[dict[str, Any]]:
    """For the ``results`` of ``model-index``: each figure, with the original's beside it under ``args``.

    Figures that are not finite, and formats whose quantizer refused the model, are left out: `CollapseFile.statuses`
    has them.
    """
    results = []
    for row in collapse.rows:
        format = row.format or FULL_PRECISION
        for task, figures in row.protected.figures.items():
            beside = {} if row.original is None else row.original.figures.get(task, {})
            metrics = []
            for figure, value in figures.items():
                if value is None:
                    continue
                metric: dict[str, Any] = {"type": figure, "value": value, "name": _NAMES.get(figure, figure)}
                if beside.get(figure) is not None:
                    metric["args"] = {"original": beside[figure]}
                metrics.append(metric)
            if metrics:
                dataset = {"type": f"qguard-{task}", "name": f"qguard collapse, {task}, {format}", "config": format}
                task_type = {"type": "text-generation", "name": "Text generation"}
                results.append({"task": task_type, "dataset": dataset, "metrics": metrics, "source": SOURCE})
    return results
