"""What the documentation shows of nested widths works as shown."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import optimum_qguard
from optimum_qguard.precision.nested import nested_layers

PAGE = Path(optimum_qguard.__file__).parent.parent / "docs" / "precision.md"


def test_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)  # so that "org/model" is a folder
    inputs = {"input_ids": torch.arange(3, 11)[None], "max_new_tokens": 3, "min_new_tokens": 3}
    namespace = {"AutoModelForCausalLM": AutoModelForCausalLM, "inputs": inputs}
    for title, blocks in (("One copy, every width", 2), ("Switching", 1)):
        (section,) = re.findall(rf"^## {title}\n(.*?)^## ", PAGE.read_text(), re.DOTALL | re.MULTILINE)
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(code) == blocks
        for block in code:
            exec(compile(block, title, "exec"), namespace)
    assert {layer.bits for layer in nested_layers(namespace["model"]).values()} == {8}
    assert len(namespace["draws"]) == 3
    assert set(namespace["draws"]) <= {4, 6, 8}
