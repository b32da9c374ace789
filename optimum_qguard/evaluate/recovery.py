"""How much of what an attack took a repair gave back.

Sources: the paper on anchor-guided repair, equation 7 (recovery) and section 4.3 (ordering and variance over prompts).
Its section 4.3 does not say whether the variance is that of perplexity or of its logarithm; here it is that of
perplexity, as its figures' axes are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimum_qguard.evaluate.errors import EvaluationError


def recovery(clean: float, attacked: float, defended: float) -> float:
    """``(attacked - defended) / (attacked - clean)``: 0 where nothing was repaired, 1 where all was, more than 1 where
    the repaired model is better than the clean one, less than 0 where the repair did harm.

    Args:
        clean, attacked, defended: perplexities of the three models on one text, in one precision.

    Raises:
        EvaluationError: a perplexity that is not finite, or an attack that did no harm.
    """
    if not all(math.isfinite(value) for value in (clean, attacked, defended)):
        raise EvaluationError(f"perplexities {clean:g}, {attacked:g} and {defended:g}: all of them must be finite")
    if attacked <= clean:
        raise EvaluationError(
            f"the attacked model's perplexity {attacked:g} is not above the clean one's {clean:g}: nothing to recover"
        )
    return (attacked - defended) / (attacked - clean)


@dataclass(frozen=True)
class PromptComparison:
    """Three models' perplexities prompt by prompt; all sequences are of one length.

    Attributes:
        clean, attacked, defended: what `prompt_perplexities` gave for each model.

    Raises:
        EvaluationError: lengths that differ, fewer than two prompts, or a perplexity that is not finite.
    """

    clean: Sequence[float]
    attacked: Sequence[float]
    defended: Sequence[float]

    def __post_init__(self) -> None:
        lengths = [len(values) for values in (self.clean, self.attacked, self.defended)]
        if len(set(lengths)) > 1 or lengths[0] < 2:
            raise EvaluationError(f"{lengths} perplexities: the models need one for each of at least two prompts")
        if not all(math.isfinite(value) for values in (self.clean, self.attacked, self.defended) for value in values):
            raise EvaluationError("a prompt's perplexity is not finite, so the models cannot be compared on it")

    @property
    def ordered(self) -> float:
        """Share of the prompts with ``clean < defended < attacked``."""
        triples = zip(self.clean, self.defended, self.attacked, strict=True)
        return statistics.fmean(clean < defended < attacked for clean, defended, attacked in triples)

    @property
    def improved(self) -> float:
        """Share of the prompts with ``defended < attacked``."""
        pairs = zip(self.defended, self.attacked, strict=True)
        return statistics.fmean(defended < attacked for defended, attacked in pairs)

    @property
    def variance_reduction(self) -> float:
        """``1 - var(defended) / var(attacked)``, the variances over the prompts.

        Raises:
            EvaluationError: the attacked model has the same perplexity everywhere.
        """
        attacked = statistics.pvariance(self.attacked)
        if attacked == 0:
            raise EvaluationError("the attacked model's perplexity is the same on every prompt: nothing to reduce")
        return 1 - statistics.pvariance(self.defended) / attacked

    def by_category(self, categories: Sequence[str]) -> dict[str, float | None]:
        """`recovery` of each category's mean perplexities, in the order of their first prompts; ``None`` where the
        attack did no harm.

        Args:
            categories: of each prompt.

        Raises:
            EvaluationError: another number of categories than of prompts.
        """
        if len(categories) != len(self.clean):
            raise EvaluationError(f"{len(categories)} categories for {len(self.clean)} prompts: give each prompt one")
        found: dict[str, float | None] = {}
        for category in dict.fromkeys(categories):
            chosen = [index for index, each in enumerate(categories) if each == category]
            clean, attacked, defended = (
                statistics.fmean(values[index] for index in chosen)
                for values in (self.clean, self.attacked, self.defended)
            )
            found[category] = recovery(clean, attacked, defended) if attacked > clean else None
        return found


def noise_curve(measured: Mapping[float, float]) -> tuple[float, float]:
    """``a`` and ``b`` of ``log r = a sigma**2 + b``, fitted by least squares (equation 3 of the paper).

    Args:
        measured: ratio of perplexities to the clean model's, by the noise's standard deviation.

    Raises:
        EvaluationError: fewer than two different noises, or a ratio that has no logarithm.
    """
    if len(measured) < 2 or not all(ratio > 0 and math.isfinite(ratio) for ratio in measured.values()):
        raise EvaluationError("a curve needs the ratios of at least two noises, all of them positive and finite")
    slope, offset = statistics.linear_regression(
        [sigma**2 for sigma in measured], [math.log(ratio) for ratio in measured.values()]
    )
    return slope, offset
