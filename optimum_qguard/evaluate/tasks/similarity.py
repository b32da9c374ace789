"""How close the model's answers are in meaning to the reference's."""

from __future__ import annotations

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.dataset import require
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.similarity import bert_score, minilm_path, similarity
from optimum_qguard.evaluate.task import Task, register


class SentenceSimilarity(Task):
    """``cosine`` and ``retrieval_at_1`` of sentence embeddings."""

    needs_reference = True

    def check(self, options: Options) -> None:
        minilm_path()

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        found = similarity(*_texts(subject, reference))
        return {"cosine": found.cosine, "retrieval_at_1": found.retrieval_at_1}


class TokenSimilarity(Task):
    """BERTScore's ``precision``, ``recall`` and ``f1``."""

    needs_reference = True

    def check(self, options: Options) -> None:
        minilm_path()
        require("torchmetrics")

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        found = bert_score(*_texts(subject, reference))
        return {"precision": found.precision, "recall": found.recall, "f1": found.f1}


def _texts(subject: Behaviour, reference: Behaviour | None) -> tuple[list[str], list[str]]:
    assert reference is not None, "needs_reference"
    return [answer.text for answer in subject.answers], [answer.text for answer in reference.answers]


register("similarity", SentenceSimilarity)
register("bert-score", TokenSimilarity)
