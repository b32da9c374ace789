"""Perplexity of a text and, with a reference, KL divergence from it: one pass of the model for both."""

from __future__ import annotations

from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.perplexity import perplexity, perplexity_and_kl
from optimum_qguard.evaluate.task import Task, register


class Perplexity(Task):
    """``perplexity``, and ``kl`` with a reference."""

    def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
        windows = subject.windows
        if reference is None:
            return {"perplexity": perplexity(subject.model, subject.tokenizer, subject.text, **windows)}
        quality = perplexity_and_kl(reference.logits, subject.model, subject.tokenizer, subject.text, **windows)
        return {"perplexity": quality.perplexity, "kl": quality.kl}


register("perplexity", Perplexity)
