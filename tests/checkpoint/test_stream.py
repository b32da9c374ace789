import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from optimum_qguard.checkpoint import CheckpointError, open_checkpoint
from optimum_qguard.checkpoint import stream as stream_module
from optimum_qguard.checkpoint.stream import rewrite_shards


class Look:
    """Leaves a tensor as it is, and says with how many threads torch worked on it."""

    whole = False

    def __init__(self, seen: set[int]) -> None:
        self._seen = seen

    def piece(self, rows: Tensor, start: int) -> Tensor:
        self._seen.add(torch.get_num_threads())
        return rows

    def done(self) -> None:
        pass


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize(("workers", "share"), [(1, 6), (2, 3), (8, 1)])
def test_workers_share_torchs_threads(tiny_llama: Path, tmp_path: Path, workers: int, share: int) -> None:
    before = torch.get_num_threads()
    seen: set[int] = set()
    try:
        torch.set_num_threads(6)
        rewrite_shards(open_checkpoint(tiny_llama), tmp_path, lambda _: Look(seen), workers=workers)
        assert seen == {share}
        assert torch.get_num_threads() == threads_of_a_new_thread() == 6
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"t{number}": torch.zeros(2000, 64)}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {f"t{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("failing", ["t1", "t2"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_when_one_file_fails_no_other_is_written_to_its_end(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: type[BaseException]
) -> None:
    """A file of gigabytes takes long, and whoever pressed Ctrl-C waits for it."""
    monkeypatch.setattr(stream_module, "PIECE_BYTES", 1024)
    begun, never = Event(), Event()
    pieces = 0

    class Piece:
        whole = False

        def __init__(self, name: str) -> None:
            self._fails = name == failing

        def piece(self, rows: Tensor, start: int) -> Tensor:
            nonlocal pieces
            if self._fails:
                begun.wait(60)
                raise error
            pieces += 1
            begun.set()
            never.wait(0.02)
            return rows

        def done(self) -> None:
            pass

    (tmp_path / "out").mkdir()
    with pytest.raises(error):
        rewrite_shards(open_checkpoint(two_files), tmp_path / "out", lambda info: Piece(info.name), workers=2)
    assert 0 < pieces < 500  # of the other file


def test_a_file_that_cannot_be_read_is_not_one_that_cannot_be_written(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FileIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **options: opened(path, mode, **options) if mode != "rb" else Broken(path)
    )
    reader = open_checkpoint(two_files)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model/model-0000[12]-of-00002\.safetensors: cannot be read: Input/out"):
        rewrite_shards(reader, tmp_path / "out", lambda _: Look(set()))


def test_without_workers_nothing_is_written(two_files: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="workers is a number from 1 on, not 0"):
        rewrite_shards(open_checkpoint(two_files), tmp_path, lambda _: Look(set()), workers=0)
