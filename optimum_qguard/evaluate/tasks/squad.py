"""Answers out of a passage, on a data set of SQuAD's format."""

from __future__ import annotations

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.dataset import require
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.squad import load_squad, squad
from optimum_qguard.evaluate.task import Task, register, source_of

_NAME = "squad"


class Squad(Task):
    """``f1`` and ``exact_match``, from 0 to 1."""

    def check(self, options: Options) -> None:
        source_of(_NAME, options)
        require("datasets")
        require("torchmetrics")

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        options = subject.options
        source, name, split = source_of(_NAME, options)
        passages = load_squad(source, name=name, split=split, limit=options.limit)
        found = squad(subject.model, subject.tokenizer, passages, batch_size=options.batch_size)
        return {"f1": found.f1, "exact_match": found.exact_match}


register(_NAME, Squad)
