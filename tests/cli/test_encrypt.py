"""``qguard encrypt`` and ``qguard decrypt``."""

import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_qguard.encrypt.key import Key

IDS = torch.arange(24).view(2, 12) * 17 % 512


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(IDS).logits
    return found


def test_there_and_back(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    key = tmp_path / "model.key"
    result = qguard("encrypt", model, tmp_path / "out", "--key", key, "--new-key")
    assert result.code == 0
    assert "18 of 21 tensors rewritten at 10 sites (4 norm, 2 value, 2 up, 2 key)" in result.out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert torch.equal(logits(tmp_path / "out"), logits(model))
    result = qguard("decrypt", tmp_path / "out", tmp_path / "back", "--key", key)
    assert result.code == 0
    assert "All 21 tensors are bit for bit what they were" in result.out
    for path in model.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_json_and_options(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    key = tmp_path / "model.key"
    Key.generate().save(key)
    manifest = qguard(
        "encrypt",
        model,
        tmp_path / "out",
        "--key",
        key,
        "--strength",
        7,
        "--fraction",
        0.5,
        "--qk-fraction",
        0.3,
        "--json",
    ).json
    assert manifest["kind"] == "encrypted"
    assert manifest["traps"] == {"strength": 7, "fraction": 0.5, "qk_fraction": 0.3, "positive_only": False}
    assert qguard("decrypt", tmp_path / "out", tmp_path / "back", "--key", key, "--json").json == manifest


def test_the_key_is_not_copied_although_it_lies_beside_the_weights(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """Under a name that does not say so: OUT is there to be published."""
    result = qguard("encrypt", model, tmp_path / "out", "--key", model / "secret.json", "--new-key")
    assert result.code == 0
    assert {path.name for path in model.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()} == {
        "secret.json"
    }


def test_names_with_brackets_and_colons_are_printed_as_they_are(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    out, back, key = tmp_path / "[bold]out", tmp_path / "back[/]:warning:", tmp_path / "[red]key"
    result = qguard("encrypt", model, out, "--key", key, "--new-key")
    assert f"Written to {out}. Keep {key} secret" in result.out
    result = qguard("decrypt", out, back, "--key", key)
    assert f"Written to {back}." in result.out


def test_fp16_safe(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    """Half precision stays finite, and nearer to the original than BF16 is."""
    qguard("encrypt", model, tmp_path / "out", "--key", tmp_path / "key", "--new-key", "--fp16-safe")
    assert torch.equal(logits(tmp_path / "out"), logits(model))
    half, original = logits(tmp_path / "out", torch.float16), logits(model, torch.float32)
    assert bool(half.isfinite().all())
    assert (half - original).abs().max() < (logits(model) - original).abs().max()


def test_fp16_safe_traps_are_not_made_stronger(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    arguments = ("encrypt", model, tmp_path / "out", "--key", tmp_path / "key", "--new-key", "--fp16-safe")
    assert "may overflow in FP16; with --fp16-safe it is at most 9" in refused(*arguments, "--strength", 10)
    assert "--qk-fraction does nothing with --fp16-safe" in refused(*arguments, "--qk-fraction", 0.5)


def test_a_new_key_is_kept_where_something_may_have_been_written(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """A run that fails while it replaces what is in a folder leaves files that only this key undoes."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(half)
    (tmp_path / "out").mkdir()
    arguments = ("encrypt", half, tmp_path / "out", "--key", tmp_path / "key", "--new-key")
    assert qguard(*arguments).code == 2
    assert Key.load(tmp_path / "key")


class TestBadInput:
    def test_no_key(self, refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
        assert "cannot be read" in refused("encrypt", model, tmp_path / "out", "--key", tmp_path / "key")
        assert "cannot be read" in refused("decrypt", model, tmp_path / "out", "--key", tmp_path / "key")
        assert "--key" in refused("encrypt", model, tmp_path / "out", code=64)

    def test_a_key_is_not_overwritten(self, refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
        Key.generate().save(tmp_path / "key")
        line = refused("encrypt", model, tmp_path / "out", "--key", tmp_path / "key", "--new-key")
        assert "never overwritten" in line

    def test_no_key_is_left_of_a_run_that_failed(
        self, refused: Callable[..., str], model: Path, tmp_path: Path
    ) -> None:
        refused("encrypt", model, model, "--key", tmp_path / "key", "--new-key")
        refused("encrypt", tmp_path / "none", tmp_path / "out", "--key", tmp_path / "key", "--new-key")
        refused("encrypt", model, tmp_path / "out", "--key", tmp_path / "key", "--new-key", "--strength", 0)

    def test_not_encrypted(self, refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
        Key.generate().save(tmp_path / "key")
        line = refused("decrypt", model, tmp_path / "out", "--key", tmp_path / "key")
        assert "no encrypted checkpoint" in line

    def test_pickles(self, refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
        Key.generate().save(tmp_path / "key")
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        line = refused("encrypt", model, tmp_path / "out", "--key", tmp_path / "key")
        assert "is a pickle" in line
        assert "convert it" in line
