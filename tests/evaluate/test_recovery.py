"""The formulas, on values whose result is known in closed form."""

import math
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.recovery import PromptComparison, noise_curve, recovery

perplexities = st.floats(1.01, 1e6)
shares = st.floats(-2, 2)


@given(perplexities, st.floats(0.01, 1e6), shares)
def test_recovery_of_a_point_on_the_way(clean: float, harm: float, share: float) -> None:
    attacked = clean + harm
    assume(attacked - clean > 1e-3 * clean)
    defended = attacked - share * (attacked - clean)
    assert recovery(clean, attacked, defended) == pytest.approx(share, abs=1e-9)


def test_recovery_of_the_papers_table() -> None:
    """Its first and its best row: Qwen2.5 at 10 % in FP16, and Pythia at 20 % in 4 bits."""
    assert recovery(10.80, 12.35, 11.76) == pytest.approx(0.386, abs=0.01)
    assert recovery(13.00, 17.14, 13.88) == pytest.approx(0.788, abs=0.001)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((10, 10, 10), "not above the clean one's 10: nothing to recover"),
        ((10, 9, 10), "nothing to recover"),
        ((10, math.inf, 10), "must be finite"),
        ((10, 12, math.nan), "must be finite"),
    ],
)
def test_recovery_refused(values: tuple[float, float, float], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        recovery(*values)


def test_shares_over_prompts() -> None:
    compared = PromptComparison(clean=[1, 2, 3, 4], defended=[2, 1, 4, 6], attacked=[3, 3, 4, 5])
    assert compared.ordered == 1 / 4
    assert compared.improved == 2 / 4


@given(st.lists(perplexities, min_size=2, max_size=20), st.floats(0.1, 2))
def test_variance_reduction_of_shrunk_perplexities(attacked: list[float], factor: float) -> None:
    """``var(c x + d) = c**2 var(x)``."""
    assume(statistics.pstdev(attacked) > 1e-3 * max(attacked))
    defended = [factor * value + 3 for value in attacked]
    compared = PromptComparison(clean=attacked, attacked=attacked, defended=defended)
    assert compared.variance_reduction == pytest.approx(1 - factor**2, abs=1e-6)


def test_recovery_by_category_is_that_of_the_means() -> None:
    compared = PromptComparison(clean=[1, 10, 5, 6], attacked=[3, 10, 7, 4], defended=[2, 9, 5, 5])
    found = compared.by_category(["a", "b", "a", "b"])
    assert found == {"a": pytest.approx(recovery(6 / 2, 10 / 2, 7 / 2)), "b": None}
    assert list(found) == ["a", "b"]


def test_comparisons_refused() -> None:
    with pytest.raises(EvaluationError, match=r"\[2, 3, 2\] perplexities"):
        PromptComparison([1, 2], [1, 2, 3], [1, 2])
    with pytest.raises(EvaluationError, match="at least two prompts"):
        PromptComparison([1], [1], [1])
    with pytest.raises(EvaluationError, match="not finite"):
        PromptComparison([1, 2], [1, math.inf], [1, 2])
    same = PromptComparison([1, 2], [3, 3], [1, 2])
    with pytest.raises(EvaluationError, match="same on every prompt"):
        _ = same.variance_reduction
    with pytest.raises(EvaluationError, match="1 categories for 2 prompts"):
        same.by_category(["a"])


@given(st.floats(0.1, 1e4), st.floats(-0.1, 0.1))
def test_noise_curve_finds_the_curve(slope: float, offset: float) -> None:
    measured = {sigma: math.exp(slope * sigma**2 + offset) for sigma in (0.001, 0.01, 0.02)}
    found = noise_curve(measured)
    assert found == (pytest.approx(slope, rel=1e-6, abs=1e-6), pytest.approx(offset, abs=1e-9))


def test_noise_curve_refused() -> None:
    for measured in ({0.01: 1.1}, {0.01: 1.1, 0.02: math.inf}, {0.01: 0.0, 0.02: 1.1}):
        with pytest.raises(EvaluationError, match="at least two noises"):
            noise_curve(measured)
