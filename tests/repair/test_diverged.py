"""A repair that goes wrong stops at once, and says what can be done."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FAST, interrupt_at, same
from safetensors.torch import load_file, save_file

from optimum_qguard.repair import loop
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.run import repair_checkpoint


def test_the_step_and_the_last_checkpoint_are_named(damaged: Path, tmp_path: Path) -> None:
    """A run that diverged goes on from there with a lower rate."""
    options = {**FAST, "checkpoint_every": 1, "warmup_steps": 0, "anchor": None}
    with pytest.raises(RepairError) as caught:
        repair_checkpoint(damaged, tmp_path / "out", **{**options, "learning_rate": 1e18})
    message = str(caught.value)
    assert "step 2: the loss is nan; nothing was written, and the checkpoint of step 1 in" in message
    assert "is as bad: begin anew with --overwrite and a lower learning rate" in message
    assert [path.name for path in tmp_path.iterdir()] == [".out.repair"]
    shutil.rmtree(tmp_path / ".out.repair")

    repair_checkpoint(damaged, tmp_path / "all", **options)
    with pytest.raises(KeyboardInterrupt, match="the checkpoint of step 10 is kept; go on from it with --resume"):
        repair_checkpoint(damaged, tmp_path / "out", progress=interrupt_at(11), **options)
    report = repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "learning_rate": 1e-30})
    assert report.recipe.learning_rate == 1e-30
    repair_checkpoint(damaged, tmp_path / "ten", **{**options, "steps": 10})
    assert same(tmp_path / "out", tmp_path / "ten")
    assert not same(tmp_path / "out", tmp_path / "all")


def test_without_a_checkpoint_nothing_is_left(damaged: Path, tmp_path: Path) -> None:
    options = {**FAST, "warmup_steps": 0, "learning_rate": 1e18}
    with pytest.raises(RepairError, match="step 2: the loss is nan; nothing was written; try a lower"):
        repair_checkpoint(damaged, tmp_path / "deep" / "out", anchor=None, **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_no_numbers_before(damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(damaged, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RepairError, match=r"up_proj\.weight.*not finite|step 1: the loss is nan"):
        repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=None, **FAST)


def test_a_checkpoint_before_the_weights_that_went_wrong(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One can go on from it; from one that has those very weights nobody can, whatever the rate."""
    options = {**FAST, "checkpoint_every": 5, "anchor": None}
    step = loop.Trainer.training_step

    def broken_at(last: int) -> None:
        def broken(self: Any, *arguments: Any) -> torch.Tensor:
            loss: torch.Tensor = step(self, *arguments)
            return loss * float("nan") if self.state.global_step == last else loss

        monkeypatch.setattr(loop.Trainer, "training_step", broken)

    broken_at(7)
    with pytest.raises(RepairError, match=r"step 8: .* of step 5 lies in .*: go on from it with --resume and a lower"):
        repair_checkpoint(damaged, tmp_path / "out", **options)
    broken_at(5)
    with pytest.raises(RepairError, match=r"step 6: .* of step 5 in .* is as bad: begin anew with --overwrite and a"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "learning_rate": 1e-9})
