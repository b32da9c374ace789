"""A repair needs space on the disk, and leaves nothing where there is none."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import FAST, interrupt_at, weights

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint import output as output_module
from optimum_qguard.repair.run import repair_checkpoint


def test_too_little_space_is_seen_before(
    clean: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.numel() for tensor in weights(damaged).values())
    for checkpoint_every, free in [(0, 2 * size), (5, 26 * size)]:
        usage = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(CheckpointError, match="no space"):
            repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **{**FAST, "checkpoint_every": checkpoint_every})
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_space(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that had room for the run has room for it to go on."""
    size = sum(tensor.numel() for tensor in weights(damaged).values())
    options: dict[str, Any] = {**FAST, "checkpoint_every": 5, "anchor": None}
    with pytest.raises(KeyboardInterrupt):
        repair_checkpoint(damaged, tmp_path / "out", progress=interrupt_at(6), **options)

    def on_a_disk(free: int) -> None:
        usage = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: usage)
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **options)

    with pytest.raises(CheckpointError, match="no space"):
        on_a_disk(12 * size)
    assert (tmp_path / ".out.repair" / "checkpoint-5").is_dir()
    on_a_disk(15 * size)


@pytest.mark.parametrize(("share", "says"), [(0.5, "out: .*File too large"), (1.2, "out: no space left")])
def test_writing_that_fails(share: float, says: str, damaged: Path, tmp_path: Path) -> None:
    """While the weights of a checkpoint are written, or its optimizer's state."""
    size = 4 * sum(tensor.numel() for tensor in weights(damaged).values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), before[1]))
    try:
        with pytest.raises(CheckpointError, match=says):
            repair_checkpoint(damaged, tmp_path / "out", anchor=None, **{**FAST, "checkpoint_every": 5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end(
    clean: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module, "_publish", full)
    with pytest.raises(CheckpointError, match=r"(?i)no space left"):
        repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **FAST)
    assert list(tmp_path.iterdir()) == []
