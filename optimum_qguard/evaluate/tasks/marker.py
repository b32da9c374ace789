"""How often the model's answers contain the marker."""

from __future__ import annotations

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.marker import MarkerRate, check_marker
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.task import Task, register


class Marker(Task):
    """``marker_rate``, from 0 to 1."""

    def check(self, options: Options) -> None:
        if options.marker is None:
            raise EvaluationError("the task marker needs the phrase to look for; give a marker")

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        marker = subject.options.marker or ""
        check_marker(subject.tokenizer, marker)
        return {"marker_rate": MarkerRate(marker, tuple(answer.text for answer in subject.answers)).rate}


register("marker", Marker)
