from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimum_qguard.checkpoint import open_checkpoint
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
