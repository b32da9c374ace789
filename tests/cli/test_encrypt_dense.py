"""``qguard encrypt --mode dense`` and the way back: what they say, and what they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from optimum_qguard.encrypt.key import Key


def test_there_and_back(qguard: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    key, out = tmp_path / "model.key", tmp_path / "out"
    options = ["--mode", "dense", "--kappa", "16", "--plain-layers", "0", "--epsilon", "0.5:1", "--every", "1"]
    result = qguard("encrypt", tiny_llama, out, "--key", key, "--new-key", *options)
    assert (result.code, result.err) == (0, "")
    assert (
        "18 of 21 tensors rewritten at 10 sites (4 norm, 2 value, 2 up, 2 key), 14 verified to be exact" in result.out
    )
    assert "Of the 4 tensors that dense mode mixed, 4 will not come back bit for bit" in result.out

    result = qguard("decrypt", out, tmp_path / "back", "--key", key)
    assert "17 of 21 tensors are bit for bit what they were; the other 4, which dense mode mixed, have a" in result.out
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "back"))
    errors = [float((after[name] - before[name]).double().norm() / before[name].double().norm()) for name in before]
    assert f"relative error of {max(errors):.2e} at most" in result.out

    report = qguard("decrypt", out, tmp_path / "again", "--key", key, "--json").json
    assert report["mode"] == "dense"
    assert report["conditioning"] == {
        "kappa_min": 16,
        "kappa_max": 16,
        "plain_layers": 0,
        "spacing": 3,
        "first_layer": 0,
        "last_layer": None,
    }
    assert report["residue"]["epsilon_max"] == 1
    assert len(report["mixed"]) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kappa", "30"], "--kappa is an option of dense mode; add --mode dense"),
        (["--last-layer", "0"], "--last-layer is an option of dense mode"),
        (["--mode", "dense", "--epsilon", "much"], "--epsilon is a number, or two as MIN:MAX, not 'much'"),
        (["--mode", "dense", "--kappa", "0"], "kappa is from 1"),
        (["--mode", "dense", "--rank", "99"], "rank is at most 16, half the 32 dimensions of a head, not 99"),
    ],
)
def test_refused(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path, options: list[str], says: str) -> None:
    Key.generate().save(tmp_path / "model.key")
    assert says in refused("encrypt", tiny_llama, tmp_path / "out", "--key", tmp_path / "model.key", *options)
