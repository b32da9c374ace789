"""``qguard calibrate``: the table and the plot."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def test_the_half_widths_of_int8(qguard: Callable[..., Any], tiny_llama: Path) -> None:
    found = qguard("calibrate", tiny_llama, "--format", "bnb-int8", "--json").json
    weights = load_file(tiny_llama / "model.safetensors")
    for tensor in found["tensors"]:
        absmax = weights[tensor["name"]].half().float().abs().amax(1)
        assert tensor["half_width"] == pytest.approx(float(absmax.median()) / 254, rel=1e-6)
    assert "lm_head.weight" in weights
    assert {tensor["name"] for tensor in found["tensors"]} == {name for name in weights if "proj" in name}
    widths = torch.tensor([tensor["half_width"] for tensor in found["tensors"]], dtype=torch.float64)
    assert found["global_half_width"] == pytest.approx(float(widths.quantile(0.5)))


def test_the_table_has_a_row_for_each_kind_of_tensor(qguard: Callable[..., Any], tiny_llama: Path) -> None:
    result = qguard("calibrate", tiny_llama, "--format", "nf4")
    assert result.code == 0
    assert result.err == ""
    assert result.out.count("model.layers.*.self_attn.q_proj.weight") == 1
    assert "Global half-width" in result.out


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(qguard: Callable[..., Any], tiny_llama: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    result = qguard("calibrate", tiny_llama, "--format", "bnb-int8", "--plot", path, "--json")
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(magic[suffix])
    curve = result.json["curve"]
    assert curve["share_changed"] == pytest.approx(curve["closed_form"], abs=0.02)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_in_a_process_of_its_own_writes_nothing_but_its_result(tiny_llama: Path) -> None:
    code = "import sys; from optimum_qguard.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "calibrate", str(tiny_llama), "--format", "int8-rowwise"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "int8-rowwise" in run.stdout


def test_refused(
    refused: Callable[..., str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown format 'int3'; known: bnb-fp4, " in refused("calibrate", tiny_llama, "--format", "int3")
    assert "no such folder" in refused("calibrate", tmp_path / "none", "--format", "nf4")
    arguments = ["calibrate", tiny_llama, "--format", "nf4", "--plot"]
    assert ".png, .svg, .pdf" in refused(*arguments, tmp_path / "plot.docx")
    assert "no such folder" in refused(*arguments, tmp_path / "none" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'optimum-qguard[plot]'" in refused(*arguments, tmp_path / "plot.png")


def test_nothing_to_draw(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    arguments = ["calibrate", tmp_path, "--format", "nf4", "--plot", tmp_path / "plot.png", "--json"]
    assert "is zero, so their cells have no width and there is nothing to draw" in refused(*arguments)


def test_nan_weights(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    for format in ("bnb-int8", "nf4"):
        assert f"{name}: 1 NaN" in refused("calibrate", tmp_path, "--format", format)
