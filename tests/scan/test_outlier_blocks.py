"""Planted outliers are found from a sample of the rows; what grew by itself is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from optimum_qguard import scan
from optimum_qguard.attacks.outlier_injection import with_outliers
from optimum_qguard.formats import get_format
from optimum_qguard.scan.report import ScanReport


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(rows: int = 1024, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=generator())


def student(df: float) -> Tensor:
    chi2 = torch._standard_gamma(torch.full((1024, 512), df / 2), generator=generator()) * 2
    return normal() / (chi2 / df).sqrt()


def with_columns(factor: float) -> Tensor:
    weight = normal()
    weight[:, ::64] *= factor
    return weight


def with_super_weights() -> Tensor:
    weight = normal()
    weight[[3, 500, 900], [7, 70, 300]] = torch.tensor([300.0, -800.0, 60.0])
    return weight


GENUINE: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "heavy tails": lambda: student(3),
    "heavier tails": lambda: student(2.5),
    "large columns": lambda: with_columns(100),
    "super weights": with_super_weights,
    "pruned": lambda: normal() * (normal().roll(1) > 1.2),
    "zeros": lambda: torch.zeros(256, 256),
    "rows of many sizes": lambda: normal() * torch.logspace(-4, 2, 1024)[:, None],
    "short rows": lambda: normal(1024, 8),
    "odd length": lambda: normal(700, 77),
    "experts": lambda: normal().view(4, 256, 512),
}


def scanned(folder: Path, tensors: dict[str, Tensor], **options: bool) -> ScanReport:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    report: ScanReport = scan(folder, detectors=["outlier_blocks"], seed=1, **options)
    assert {run.state for run in report.detectors} == {"ran"}
    return report


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", GENUINE)
def test_what_grew_by_itself_is_no_alarm(kind: str, full: bool, tmp_path: Path) -> None:
    report = scanned(tmp_path, {"layer.weight": GENUINE[kind](), "norm.weight": normal(1, 512)[0]}, full=full)
    assert report.verdict == "clean", report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "factor"), [("int8-rowwise", 64), ("nf4", 512), ("nf4", 32), ("gguf-q8_0", 64)])
@pytest.mark.parametrize("full", [False, True])
def test_outliers_in_each_block_are_found(
    format: str, factor: float, dtype: torch.dtype, full: bool, tmp_path: Path
) -> None:
    attacked = with_outliers(normal().to(dtype), get_format(format), factor, generator())
    report = scanned(tmp_path, {"a.weight": normal(256), "b.weight": attacked}, full=full)
    assert report.verdict == "suspicious"
    (finding,) = report.findings
    assert finding.severity == "error"
    assert finding.tensor == "b.weight"
    assert finding.message.startswith("1 of 2 tensors have single weights")
    assert finding.value is not None
    assert finding.expected is not None
    assert finding.value > 10 * finding.expected


def test_some_in_many_tensors_are_found_together(tmp_path: Path) -> None:
    tensors = {f"{index}.weight": normal(64, 256) for index in range(30)}
    for tensor in tensors.values():
        tensor[[5, 40], [6, 60]] = 5000.0
    assert scanned(tmp_path, {"0.weight": tensors["0.weight"]}).verdict == "clean"
    report = scanned(tmp_path, tensors)
    assert report.verdict == "suspicious"
    assert report.findings[0].tensor is None
    assert "of all tensors" in report.findings[0].message


def test_what_says_that_it_is_encrypted_gets_a_note(tmp_path: Path) -> None:
    (tmp_path / "qguard.json").write_text(json.dumps({"kind": "encrypted"}))
    report = scanned(tmp_path, {"a.weight": with_outliers(normal(), get_format("nf4"), 512)})
    assert report.verdict == "clean"
    assert [finding.severity for finding in report.findings] == ["note"]
