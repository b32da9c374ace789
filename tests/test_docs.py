"""What the documentation shows works as shown."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from repair_models import save_clean, save_damaged
from transformers import AutoModelForCausalLM

from optimum_qguard.formats import Format
from optimum_qguard.formats import format as format_module
from optimum_qguard.guard.noise import draw, half_width
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.repair.anchor import Anchor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def int5() -> Format:
    """The format of CONTRIBUTING.md's worked example."""
    (code,) = [block for block in _python_blocks(ROOT / "CONTRIBUTING.md") if "register(" in block]
    namespace: dict[str, object] = {"__name__": "worked_example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    yield format_module._REGISTRY["int5-rowwise"]()
    del format_module._REGISTRY["int5-rowwise"]


def _python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_worked_example_of_a_format(int5: Format) -> None:
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    quantized = int5.quantize(weight)
    step = weight.abs().amax(1, keepdim=True) / 15
    assert torch.equal(quantized.codes, ((weight / step).round() + 15).to(torch.uint8))
    assert half_width(weight, int5, "weight") == pytest.approx(float(step.flatten().median()) / 2)
    drawn = draw(weight, int5, "stochastic", RandomStream(1, "weight"))
    torch.testing.assert_close(int5.quantize(drawn.weight).dequantize(), drawn.weight)


def test_an_anchor_in_ones_own_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate and a strength that show in a step or two."""
    (code,) = [block for block in _python_blocks(ROOT / "docs/repair.md") if "AnchorCallback(" in block]
    monkeypatch.chdir(tmp_path)
    save_damaged(save_clean("llama", tmp_path / "clean"), tmp_path / "damaged")
    tokens = torch.arange(2, 18)
    namespace: dict[str, Any] = {"examples": [{"input_ids": tokens, "labels": tokens}]}
    before = AutoModelForCausalLM.from_pretrained("damaged")
    for was, now in (('"out", learning_rate=2e-5', '"out", learning_rate=2e-3'), ("strength=250", "strength=50")):
        assert was in code
        code = code.replace(was, now)
    exec(compile(code, "docs/repair.md", "exec"), namespace)
    anchor = Anchor.open("clean", before)
    assert anchor.distance(namespace["model"]) < 0.95 * anchor.distance(before)


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
