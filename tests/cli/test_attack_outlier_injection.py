"""``qguard attack outlier-injection``: a checkpoint with outliers, or one clear line and nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimum_qguard.attacks.outlier_injection import with_outliers
from optimum_qguard.formats import get_format


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_chosen_tensors_get_the_formats_outliers(qguard: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--format", "bnb-nf4", "--factor", "64", "--tensors", "*.0.mlp.*", "--tensors", "*q_proj*", "--json"]
    result = qguard("attack", "outlier-injection", tiny_llama, tmp_path / "out", *options)
    assert result.err == ""
    before, after = tensors(tiny_llama), tensors(tmp_path / "out")
    chosen = [name for name in before if ".0.mlp." in name or "q_proj" in name]
    assert sorted(result.json["tensors"]) == sorted(chosen)
    for name, weight in before.items():
        expected = with_outliers(weight, get_format("nf4"), 64) if name in chosen else weight
        assert torch.equal(after[name], expected)


def test_the_invariant_variant(qguard: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    result = qguard("attack", "outlier-injection", tiny_llama, tmp_path / "out", "--variant", "invariant")
    assert result.code == 0
    assert "tensors changed (invariant, x512)" in result.out
    before, after = tensors(tiny_llama), tensors(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    assert set((after[norm] / before[norm]).tolist()) == {1.0, 1 / 512}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--variant", "loud"], "variant is 'loud'"),
        (["--format", "int9"], "unknown format 'int9'"),
        (["--factor", "1"], "greater than 1"),
        (["--variant", "invariant", "--factor", "500"], "only powers of two"),
        (["--variant", "invariant", "--random-signs"], "would show at full precision"),
        (["--tensors", "*.nothing.*"], r"--tensors *.nothing.*: matches none"),
    ],
)
def test_refused(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path, options: list[str], says: str) -> None:
    assert says in refused("attack", "outlier-injection", tiny_llama, tmp_path / "out", *options)
