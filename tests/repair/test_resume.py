"""A repair that was killed goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repair_models import save_clean, save_damaged, words
from runs import EARLY_STOP, FAST, interrupt_at, same

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.report import RepairReport
from optimum_qguard.repair.run import repair_checkpoint

SCRIPT = """
import json, sys, time
from optimum_qguard.repair.run import repair_checkpoint
given = json.loads(sys.argv[1])
stop = given.pop("stop")
def wait(done, total):
    print(done, flush=True)
    if done == stop:
        time.sleep(60)
repair_checkpoint(progress=wait, **given)
"""


def killed(stop: int, **given: Any) -> None:
    """Runs a repair in a process of its own, and kills it after a step."""
    arguments = json.dumps({"stop": stop, **given}, default=str)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(stop).encode():
                break
        else:
            raise AssertionError("it ended by itself")
        os.kill(process.pid, signal.SIGKILL)


def test_killed_and_resumed(tmp_path: Path, one_thread: None) -> None:
    """The same weights and figures, with dropout and with the best weights kept."""
    clean = save_clean("llama", tmp_path / "clean", attention_dropout=0.2)
    damaged = save_damaged(clean, tmp_path / "damaged")
    options = {**FAST, "checkpoint_every": 5, "evaluate_every": 3, "validation": words(200, 3), "anchor": clean}
    whole = repair_checkpoint(damaged, tmp_path / "whole", **options)
    killed(13, model=damaged, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    left = tmp_path / ".out.repair"
    assert (left / "checkpoint-10").is_dir()
    for step, state in ((15, '{"global_step": 1'), (14, "[]"), (13, "{}")):
        (left / f"checkpoint-{step}").mkdir()
        (left / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    with pytest.raises(RepairError, match=r"left its checkpoint of step 10; go on from it with --resume"):
        repair_checkpoint(damaged, tmp_path / "out", **options)
    with pytest.raises(RepairError, match=r"begun with another seed \(0, now 1\)"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, seed=1, **options)
    with pytest.raises(RepairError, match="begun with another text"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "text": words(1000)})
    with pytest.raises(RepairError, match="begun with another validation text"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "validation": words(200, 4)})
    with pytest.raises(RepairError, match="is of step 10 already, beyond the 9 steps asked for"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "steps": 9})
    seen: list[int] = []
    report = repair_checkpoint(
        damaged, tmp_path / "out", resume=True, progress=lambda done, _: seen.append(done), **options
    )
    assert seen[0] == 10
    assert same(tmp_path / "out", tmp_path / "whole")
    assert report.validation == whole.validation
    assert report.losses[-1] == whole.losses[-1]
    assert not left.exists()


def test_killed_after_training(clean: Path, damaged: Path, tmp_path: Path, one_thread: None) -> None:
    """Whatever step was the last; also when validation had ended it."""
    options = {**FAST, "checkpoint_every": 5, "anchor": clean}
    repair_checkpoint(damaged, tmp_path / "whole", **options)
    (tmp_path / "out").mkdir()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepairReport, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            repair_checkpoint(damaged, tmp_path / "out", **options)
    repair_checkpoint(damaged, tmp_path / "out", resume=True, **options)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_after_an_early_stop(damaged: Path, tmp_path: Path, one_thread: None) -> None:
    held_out = " ".join(f"w{index * 31 % 128}" for index in range(400))
    options = {**EARLY_STOP, "text": words(64), "checkpoint_every": 4, "validation": held_out}
    whole = repair_checkpoint(damaged, tmp_path / "whole", anchor=None, **options)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepairReport, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            repair_checkpoint(damaged, tmp_path / "out", anchor=None, **options)
    report = repair_checkpoint(damaged, tmp_path / "out", anchor=None, resume=True, **options)
    assert report.steps_trained == whole.steps_trained < 60
    assert same(tmp_path / "out", tmp_path / "whole")


def test_with_nothing_to_go_on_from_it_begins(clean: Path, damaged: Path, tmp_path: Path) -> None:
    report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, resume=True, **{**FAST, "steps": 2})
    assert report.steps_done == 2


def test_two_runs_into_one_folder(clean: Path, damaged: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def another(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="another run is writing to it") as caught:
                repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **FAST)
            refused.append(str(caught.value))

    repair_checkpoint(damaged, tmp_path / "out", anchor=clean, progress=another, **FAST)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(model: Path, out: Path, **options: Any) -> Path:
    """A run that was stopped after step 11 of 20; what it left at step 10."""
    with pytest.raises(KeyboardInterrupt):
        repair_checkpoint(model, out, progress=interrupt_at(11), **options)
    return out.with_name(f".{out.name}.repair") / "checkpoint-10"


def test_how_often_it_measures_and_saves_may_change(damaged: Path, tmp_path: Path) -> None:
    options = {**FAST, "checkpoint_every": 5, "evaluate_every": 8, "validation": words(200, 3), "anchor": None}
    last = interrupted(damaged, tmp_path / "out", **options)
    saved: set[str] = set()

    def look(_done: int, _total: int) -> None:
        saved.update(path.name for path in last.parent.glob("checkpoint-*"))

    others = {**options, "evaluate_every": 3, "checkpoint_every": 2}
    report = repair_checkpoint(damaged, tmp_path / "out", resume=True, progress=look, **others)
    assert [entry.step for entry in report.validation] == [0, 8, 12, 15, 18, 20]
    assert {"checkpoint-12", "checkpoint-14", "checkpoint-16"} <= saved


def test_no_further_than_the_checkpoint(damaged: Path, tmp_path: Path, one_thread: None) -> None:
    """Nothing was measured by then, and what is written is measured all the same."""
    options = {**FAST, "checkpoint_every": 5, "validation": words(200, 3), "anchor": None}
    interrupted(damaged, tmp_path / "out", **options)
    ten = {**options, "steps": 10}
    report = repair_checkpoint(damaged, tmp_path / "out", resume=True, **ten)
    assert report.steps_done == 10
    assert report.validation == repair_checkpoint(damaged, tmp_path / "ten", **ten).validation
    assert same(tmp_path / "out", tmp_path / "ten")


def test_weights_on_the_way_that_are_gone(damaged: Path, tmp_path: Path) -> None:
    options = {**FAST, "checkpoint_every": 5, "anchor": None}
    interrupted(damaged, tmp_path / "out", keep_at=[4], **options)
    with pytest.raises(RepairError, match=r"after step 7 are to be kept, and were not: .* is of step 10 already"):
        repair_checkpoint(damaged, tmp_path / "out", resume=True, keep_at=[7, 15], **options)
    repair_checkpoint(damaged, tmp_path / "out", resume=True, keep_at=[4, 15], **options)
    assert (tmp_path / "out-15").is_dir()


@pytest.mark.parametrize(
    "name", ["settings.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_that_is_damaged(name: str, damaged: Path, tmp_path: Path) -> None:
    """As after a power failure: half a file, or none."""
    options = {**FAST, "checkpoint_every": 5, "anchor": None}
    last = interrupted(damaged, tmp_path / "out", **options)
    (path,) = last.parent.rglob(name)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(RepairError, match=rf"{name}: is .*damaged, so nothing can go on from there; begin again"):
            repair_checkpoint(damaged, tmp_path / "out", resume=True, **options)
    repair_checkpoint(damaged, tmp_path / "out", overwrite=True, **options)
