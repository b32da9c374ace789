"""What the documentation shows works as shown."""

import re
from pathlib import Path

import pytest
import torch

from optimum_qguard.formats import Format
from optimum_qguard.formats import format as format_module
from optimum_qguard.guard.noise import draw, half_width
from optimum_qguard.guard.random import RandomStream

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


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
