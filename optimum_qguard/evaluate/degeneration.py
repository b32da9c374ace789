"""How much a text repeats itself: MaxRepeat-n and Seq-Rep-n.

For a sequence ``s`` of N elements, "Quantization-Adversarial Reparameterization" (section 4) defines

    MaxRepeat = max over i ≤ N of  sum from j = i to N of  product from r = i + 1 to j of [s_r = s_{r-1}]

which is the length of the longest run of equal neighbours, and reports for n = 3 "the longest streak of identical
3-grams". Read here: the elements are n-grams laid end to end, and the streak is the longest over the n places where the
first one may begin, so that ``a b c a b c a b c`` has a streak of three.

Seq-Rep-n is the share of n-grams (here those at every place, overlapping) that occurred before in the same text
(Welleck et al. 2019, arXiv:1908.04319).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import Answer, generate_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_REPEAT_N = 3
SEQ_REP_N = 4


@dataclass(frozen=True)
class Degeneration:
    """Means over a model's answers, of their tokens.

    Attributes:
        max_repeat: MaxRepeat-3: about 1 for healthy text, hundreds for a model that loops.
        seq_rep: Seq-Rep-4, from 0 to 1.
        n: how many answers.
    """

    max_repeat: float
    seq_rep: float
    n: int


def longest_run(sequence: Sequence[Hashable]) -> int:
    """The paper's formula: the length of the longest run of equal neighbours; 0 for an empty sequence."""
    longest = run = 0
    for index, element in enumerate(sequence):
        run = run + 1 if index and element == sequence[index - 1] else 1
        longest = max(longest, run)
    return longest


def max_repeat(tokens: Sequence[Hashable], n: int = MAX_REPEAT_N) -> int:
    """MaxRepeat-n: the longest streak of one n-gram following itself directly.

    Args:
        tokens: token ids, or words.
        n: the length of the n-grams.

    Returns:
        The streak in n-grams: 1 for a text that does not loop, 0 for one shorter than ``n``.

    Raises:
        EvaluationError: ``n`` is below 1.
    """
    grams = _n_grams(tokens, n)
    return max((longest_run(grams[start::n]) for start in range(n)), default=0)


def seq_rep(tokens: Sequence[Hashable], n: int = SEQ_REP_N) -> float:
    """Seq-Rep-n: ``1 - unique n-grams / n-grams``; 0 for a text shorter than ``n``.

    Args:
        tokens, n: as for `max_repeat`.

    Raises:
        EvaluationError: ``n`` is below 1.
    """
    grams = _n_grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def degeneration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> Degeneration:
    """Ask every prompt and measure how the greedy answers repeat themselves.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size: as for `generate_answers`.

    Raises:
        EvaluationError: as for `generate_answers`.
    """
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return degeneration_of(answers)


def degeneration_of(answers: Sequence[Answer]) -> Degeneration:
    """The same for answers that are there already; at least one."""
    n = len(answers)
    return Degeneration(
        sum(max_repeat(answer.tokens) for answer in answers) / n,
        sum(seq_rep(answer.tokens) for answer in answers) / n,
        n,
    )


def _n_grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Those at every place, overlapping."""
    if n < 1:
        raise EvaluationError(f"n {n}: an n-gram has at least one token")
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
