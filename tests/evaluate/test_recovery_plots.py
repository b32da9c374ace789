"""The pictures are drawn, and refused where they would show something else."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.prompt_suite import suite_categories
from optimum_qguard.evaluate.recovery import PromptComparison
from optimum_qguard.evaluate.recovery_plots import plot_categories, plot_noise, plot_ordering, plot_variance
from optimum_qguard.guard.errors import QGuardConfigError

pytest.importorskip("matplotlib")

CATEGORIES = suite_categories()


def comparison(share: float) -> PromptComparison:
    clean = [20 + 7 * math.sin(index) for index in range(96)]
    attacked = [value * (1.3 + 0.2 * math.cos(3 * index)) for index, value in enumerate(clean)]
    pairs = enumerate(zip(clean, attacked, strict=True))
    return PromptComparison(clean, attacked, [b - (b - a) * (share + 0.2 * math.sin(5 * i)) for i, (a, b) in pairs])


COMPARED = {"no anchor, r = 1.20": comparison(0.5), "default, r = 1.20": comparison(0.95)}
MEASURED = {sigma: math.exp(1200 * sigma**2 + 0.003) for sigma in (0.004, 0.008, 0.009, 0.0105, 0.012)}
DRAWN = {
    "noise": lambda path: plot_noise(MEASURED, {0.009: 1.1, 0.012: 1.2}, path),
    "ordering": lambda path: plot_ordering(COMPARED, path),
    "variance": lambda path: plot_variance(COMPARED, path),
    "categories": lambda path: plot_categories(
        {label: {**each.by_category(CATEGORIES), "logic": None, "dialogue": 7.0} for label, each in COMPARED.items()},
        path,
    ),
}


@pytest.mark.parametrize("figure", DRAWN)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_drawn(figure: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{figure}{suffix}"
    draw: Callable[[Path], None] = DRAWN[figure]
    draw(path)
    assert path.read_bytes()[:4] == (b"\x89PNG" if suffix == ".png" else b"<?xm")
    with pytest.raises(QGuardConfigError, match="name ends in one of"):
        draw(tmp_path / "picture.txt")


def test_more_repairs_than_colours(tmp_path: Path) -> None:
    shares = {f"repair {index}": {"logic": index / 20, "dialogue": 0.5} for index in range(23)}
    plot_categories(shares, tmp_path / "categories.png")
    assert (tmp_path / "categories.png").exists()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="at least two noises"):
        plot_noise({0.01: 1.1}, {}, tmp_path / "noise.png")
    with pytest.raises(EvaluationError, match="not measured on the same categories"):
        plot_categories({"a": {"logic": 1.0}, "b": {"dialogue": 1.0}}, tmp_path / "categories.png")
    with pytest.raises(EvaluationError, match="not measured on the same categories"):
        plot_categories({}, tmp_path / "categories.png")
    assert not list(tmp_path.iterdir())
