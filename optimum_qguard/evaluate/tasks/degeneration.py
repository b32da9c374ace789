"""How the model's answers repeat themselves."""

from __future__ import annotations

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.degeneration import degeneration_of
from optimum_qguard.evaluate.task import Task, register


class Degeneration(Task):
    """``max_repeat_3`` and ``seq_rep_4``, means over the answers."""

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        found = degeneration_of(subject.answers)
        return {"max_repeat_3": found.max_repeat, "seq_rep_4": found.seq_rep}


register("degeneration", Degeneration)
