"""Each side of the step benchmark trains as it says. No time is asserted."""

import sys
from pathlib import Path

import pytest
import repair_step
import torch
from harness import Peak
from repair_models import save_clean, save_damaged
from repair_step import COUPLED, DECOUPLED, PAPER, SIDES, WITHOUT

from optimum_qguard.repair.anchor import Anchor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A damaged and a clean model."""
    clean = save_clean("llama", tmp_path_factory.mktemp("models") / "clean")
    return save_damaged(clean, clean.parent / "damaged"), clean


def test_what_each_side_does_to_the_weights(models: tuple[Path, Path]) -> None:
    """Decoupled they get nearer by η λ a step; coupled they get other weights; the paper's penalty changes nothing."""
    damaged, clean = models
    trained = {}
    for way in SIDES:
        turns, trained[way] = repair_step.train((way,), 16, 3, "cpu", damaged, clean)
        assert {side: len(seconds) for side, seconds in turns.seconds.items()} == {way: 3}
    weights = {way: torch.cat([weight.flatten() for weight in model.parameters()]) for way, model in trained.items()}
    assert torch.equal(weights[PAPER], weights[WITHOUT])
    assert not torch.equal(weights[COUPLED], weights[WITHOUT])
    distance = {way: Anchor.open(clean, model).distance(model) for way, model in trained.items()}
    shares = 250 * 2e-5 * torch.tensor([0.0, 0.1, 0.2])  # the rate rises in ten steps
    assert distance[DECOUPLED] / distance[WITHOUT] == pytest.approx(float((1 - shares).prod()), rel=2e-4)


def test_the_papers_penalty_is_the_distance(models: tuple[Path, Path]) -> None:
    damaged, clean = models
    turns, trained = repair_step.train((PAPER, COUPLED), 16, 1, "cpu", damaged, clean)
    assert turns.paper is not None
    penalty = turns.paper.penalty(trained)
    assert float(penalty) == pytest.approx(Anchor.open(clean, trained).loss(trained), rel=1e-5)
    assert not penalty.requires_grad


def test_the_rows(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_step, "smollm2_path", lambda off_grid=False: models[0] if off_grid else models[1])
    options = ["--block-size", "16", "--steps", "2", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["repair_step.py", *options])
    peaks = {way: Peak(rss=(4 + index) * 10**6, cuda=0, anonymous=4 * 10**6) for index, way in enumerate(SIDES)}
    monkeypatch.setattr(repair_step, "peak_memory", lambda function, prepare: peaks[function.args[0]])
    written = []
    monkeypatch.setattr(repair_step, "write", lambda name, rows, output: written.append((name, list(rows), output)))
    repair_step.main()
    ((name, rows, output),) = written
    assert (name, output) == ("repair_step", tmp_path / "out.json")
    assert [row["anchor"] for row in rows] == list(SIDES)
    for row in rows:
        assert row["block"] == "2 x 16"
        assert (row["log CPU s"] is None) == (row["anchor"] in (WITHOUT, PAPER))
    assert [rows[0][name] for name in ("time ratio", "CPU ratio", "peak ratio")] == [1, 1, 1]
    assert [(row["peak MB"], row["peak ratio"], row["peak, anonymous ratio"]) for row in rows] == [
        (4, 1, 1),
        (5, 1.25, 1),
        (6, 1.5, 1),
        (7, 1.75, 1),
    ]


def test_alone_it_trains(models: tuple[Path, Path]) -> None:
    repair_step._train_alone(COUPLED, 16, "cpu", *models)
