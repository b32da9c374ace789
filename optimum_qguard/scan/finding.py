"""What a detector says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from optimum_qguard.checkpoint.errors import printable

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
"""From least to most. Warnings and errors make a repository suspicious; a note never does."""


def _printable(text: Any) -> Any:
    return printable(text) if isinstance(text, str) else text


Line = Annotated[str, BeforeValidator(_printable)]
"""One printable line, whatever it quotes from a repository: no report sends a terminal anything else."""


class Finding(BaseModel):
    """One statement.

    Attributes:
        detector: who says it.
        severity: see `SEVERITIES`.
        message: one sentence that a person understands.
        tensor, file: what it is about; ``None`` for the whole repository.
        format: the quantization format that it is about, as `optimum_qguard.formats` calls it.
        statistic: what was measured, ``value`` how much it was, and ``expected`` how much it is in a clean checkpoint.
        p_value: how probable a value so extreme is in a clean checkpoint, before the number of tests is accounted for.
        unsettled: whether it leaves open if the checkpoint is clean, so that nobody may call it that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    detector: Line
    severity: Severity
    message: Line
    tensor: Line | None = None
    file: Line | None = None
    format: Line | None = None
    statistic: Line | None = None
    value: float | None = None
    expected: float | None = None
    p_value: float | None = None
    unsettled: bool = False


class Plot(BaseModel):
    """A figure for the report's page.

    Attributes:
        kind: bars over intervals, or a line.
        x: middles of the bars' intervals, or the line's points; ``y`` their heights.
        expected: heights in a clean checkpoint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    detector: Line
    title: Line
    kind: Literal["bars", "line"]
    x_label: Line
    y_label: Line
    x: list[float]
    y: list[float]
    expected: list[float] | None = None


@dataclass
class Conclusion:
    """All that a detector has to say about a repository.

    Attributes:
        not_run: why it could not look at this repository at all; ``None`` if it did.
    """

    findings: list[Finding] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    not_run: str | None = None


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, for a sentence."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
