"""Which weights are looked at."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from optimum_qguard.checkpoint.repository import open_repository
from optimum_qguard.scan import sample as sample_module
from optimum_qguard.scan.sample import LEAST_WEIGHTS, SHARE, Sample, runs, samples
from optimum_qguard.scan.subject import read_subject


def pieces(folder: Path, tensor: Tensor, name: str = "weight", seed: int = 1, *, full: bool = False) -> list[Sample]:
    save_file({name: tensor}, folder / "model.safetensors")
    repository = open_repository(folder)
    return list(samples(repository, read_subject(repository).tensors[name], seed, full=full))


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@given(
    n_rows=st.integers(1, 20_000),
    length=st.sampled_from([1, 3, 32, 100, 576, 768, 1536, 4096, 4097]),
    seed=st.integers(0, 2**64),
    remote=st.booleans(),
)
def test_runs(n_rows: int, length: int, seed: int, remote: bool) -> None:
    """Sorted, apart, inside, from block to block, and as many as wanted."""
    chosen = runs(n_rows, length, seed, remote=remote)
    assert chosen == runs(n_rows, length, seed, remote=remote)
    assert 1 <= len(chosen) <= (1 if remote else 4)
    assert all(run.step == 1 and len(run) > 0 for run in chosen)
    edges = [edge for run in chosen for edge in (run.start, run.stop)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= n_rows
    if chosen == [range(n_rows)]:
        return
    assert all(edge * length % 256 == 0 for edge in edges if edge != n_rows)
    unit = 256 // math.gcd(length, 256) * length
    wanted = max(LEAST_WEIGHTS, SHARE * n_rows * length)
    looked_at = sum(len(run) - (run.stop * length % unit // length) for run in chosen) * length
    assert wanted - len(chosen) * unit < looked_at < wanted + unit


@pytest.mark.parametrize(("n_rows", "length"), [(1024, 256), (1023, 320), (3001, 97)])
def test_any_row_may_be_chosen(n_rows: int, length: int) -> None:
    """Nobody can know of a row that is left alone."""
    seen: set[int] = set()
    for seed in range(3000):
        for run in runs(n_rows, length, seed, remote=False):
            seen |= {*run}
    assert seen == {*range(n_rows)}


@pytest.mark.parametrize("remote", [False, True])
def test_no_row_is_less_likely_than_another(remote: bool) -> None:
    times = torch.zeros(1024)
    for seed in range(4000):
        for run in runs(1024, 256, seed, remote=remote):
            times[run.start : run.stop] += 1
    likely = len(runs(1024, 256, 0, remote=remote)[0]) * len(runs(1024, 256, 0, remote=remote)) / 1024
    assert times.min() > 0.7 * likely * 4000
    assert times[0] > 0.7 * likely * 4000
    assert times[-1] > 0.7 * likely * 4000


@pytest.mark.parametrize("shape", [(5000, 64), (3, 700, 96)])
def test_a_quick_sample_is_those_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = numbered(*shape)
    (found,) = pieces(tmp_path, tensor)
    assert (found.tensor, found.file, found.shape) == ("weight", "model.safetensors", shape)
    assert not found.complete
    flat = tensor.reshape(-1, shape[-1])
    each = len(found.rows) // len(found.first_rows)
    expected = torch.cat([flat[first : first + each] for first in found.first_rows])
    assert torch.equal(found.rows, expected)
    assert found.rows.numel() >= LEAST_WEIGHTS * 0.9


def test_seed_and_name_decide(tmp_path: Path) -> None:
    tensor = numbered(50_000, 64)

    def chosen(name: str, seed: int) -> tuple[int, ...]:
        return pieces(tmp_path, tensor, name, seed)[0].first_rows

    assert chosen("a", 1) == chosen("a", 1)
    assert len({chosen("a", 1), chosen("a", 2), chosen("b", 1)}) == 3


@pytest.mark.parametrize("shape", [(1000, 64), (7, 100, 32), (999, 3)])
def test_a_full_sample_is_everything_once(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "_PIECE_BYTES", 20_000)
    tensor = numbered(*shape)
    found = pieces(tmp_path, tensor, full=True)
    assert torch.equal(torch.cat([piece.rows for piece in found]), tensor.reshape(-1, shape[-1]))
    assert all(piece.first_rows[0] * shape[-1] % 256 == 0 for piece in found)
    assert all(piece.complete == (len(found) == 1) for piece in found)


@pytest.mark.parametrize("full", [False, True])
def test_conv1d_is_seen_as_a_quantizer_sees_it(tmp_path: Path, full: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    stored = numbered(96, 2000)  # (in_features, out_features)
    (found,) = pieces(tmp_path, stored, "h.0.attn.c_attn.weight", full=full)
    assert found.shape == (2000, 96)
    each = len(found.rows) // len(found.first_rows)
    expected = torch.cat([stored.T[first : first + each] for first in found.first_rows])
    assert torch.equal(found.rows, expected)
    assert found.complete == full
    (embedding,) = pieces(tmp_path, numbered(2000, 96), "wte.weight")
    assert embedding.shape == (2000, 96)


def test_what_is_no_matrix(tmp_path: Path) -> None:
    (vector,) = pieces(tmp_path, numbered(300))
    assert (vector.shape, vector.rows.shape, vector.complete) == ((300,), (1, 300), True)
    (scalar,) = pieces(tmp_path, torch.tensor(2.0))
    assert (scalar.shape, scalar.rows.tolist()) == ((), [[2.0]])
    assert pieces(tmp_path, torch.zeros(4, 0)) == []
    (small,) = pieces(tmp_path, numbered(2, 3))
    assert small.complete
    assert torch.equal(small.rows, numbered(2, 3))
