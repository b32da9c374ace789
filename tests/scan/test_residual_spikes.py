"""The detector: boxes are found whatever their format and width, and what is clean, quantized before or odd is not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from optimum_qguard.attacks.boxes import boxes
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.formats import Format, get_format
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.scanner import scan

ONLY = partial(scan, detectors=["residual_spikes"], workers=1, seed=1)
FORMATS = {
    "int8-rowwise": get_format("int8-rowwise"),
    "torchao-int8": get_format("torchao-int8"),
    "nf4": get_format("nf4"),
    "fp4": get_format("fp4"),
    "gptq-4": GPTQ(4, 64),
    "quanto-int4": get_format("quanto-int4"),
    "gguf-q8_0": get_format("gguf-q8_0"),
    "gguf-q5_0": get_format("gguf-q5_0"),
    "gguf-q4_0": get_format("gguf-q4_0"),
    "gguf-q5_1": get_format("gguf-q5_1"),
}


def weights(seed: int = 0, rows: int = 64, columns: int = 512, scale: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, 1, generator=generator).mul(0.3).exp() * scale
    return torch.randn(rows, columns, generator=generator) * spread


def attacked(weight: Tensor, format: Format, keep: float) -> Tensor:
    """What training within boxes leaves: every weight moved about, and clamped."""
    moved = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) * weight.std() / 100
    return boxes(weight, [format], keep=keep).project_(moved)


def report_on(folder: Path, tensors: dict[str, Tensor], **options: bool) -> ScanReport:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    report = ONLY(folder, **options)
    assert report.detectors[0].state != "failed", report.detectors[0].reason
    return report


def alarms(report: ScanReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == "error"]


def clean(count: int = 6) -> dict[str, Tensor]:
    return {f"layers.{index}.weight": weights(index + 1) for index in range(count)}


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("format", FORMATS)
def test_one_attacked_tensor_is_found_and_named(tmp_path: Path, format: str, keep: float) -> None:
    tensors = {**clean(), "bad.weight": attacked(weights(), FORMATS[format], keep)}
    report = report_on(tmp_path, tensors)
    found = alarms(report)
    assert report.verdict == "suspicious"
    assert {finding.tensor for finding in found} <= {None, "bad.weight"}
    assert any(finding.tensor == "bad.weight" for finding in found)


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_the_format_and_the_margin_are_named(tmp_path: Path, keep: float) -> None:
    tensors = {**clean(), "bad.weight": attacked(weights(), FORMATS["int8-rowwise"], keep)}
    finding = alarms(report_on(tmp_path, tensors))[0]
    assert finding.format == "int8-rowwise"
    assert f"{keep / 2:.2f} steps" in finding.message
    assert finding.p_value is not None
    assert finding.p_value < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["int8-rowwise", "nf4", "gptq-4", "gguf-q5_0"])
def test_it_is_found_in_16_bits_too(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    tensors = {**clean(), "bad.weight": attacked(weights(rows=128), FORMATS[format], 0.6)}
    assert alarms(report_on(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()}))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clean_weights_are_clean(tmp_path: Path, dtype: torch.dtype, full: bool) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in clean().items()}
    report = report_on(tmp_path, tensors, full=full)
    assert (report.verdict, report.findings) == ("clean", [])
    assert [plot.kind for plot in report.plots] == ["bars"]


@pytest.mark.parametrize("format", ["int8-rowwise", "nf4", "gguf-q4_1", "gguf-q8_0", "gptq-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weights_are_recognised(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    quantizer = FORMATS.get(format) or get_format(format)
    tensors = {name: quantizer.quantize(tensor).dequantize().to(dtype) for name, tensor in clean().items()}
    report = report_on(tmp_path, tensors)
    assert not alarms(report)
    assert any("quantized before" in finding.message for finding in report.findings)
    assert report.verdict == "clean"


@pytest.mark.parametrize("format", ["gguf-q4_1", "gguf-q8_0", "nf4"])
@pytest.mark.parametrize("far", [0.02, 0.06, 0.12])
def test_a_short_training_after_quantization_is_no_attack(tmp_path: Path, format: str, far: float) -> None:
    tensors = {}
    for name, tensor in clean().items():
        quantized = get_format(format).quantize(tensor)
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
        tensors[name] = quantized.dequantize() + noise * quantized.half_widths().mean() * 2 * far
    assert not alarms(report_on(tmp_path, tensors))


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(64, 512),
        torch.ones(64, 512),
        weights() * (weights(3).abs() > 0.02),
        weights() * torch.tensor([2.0**9, 1, 1, 1]).repeat(128),
        weights()[:1].repeat(64, 1),
        torch.eye(512),
        torch.sign(weights()) * 0.02,
    ],
    ids=["zeros", "ones", "pruned", "outlier columns", "one row", "identity", "signs"],
)
def test_odd_tensors_raise_no_alarm(tmp_path: Path, odd: Tensor) -> None:
    assert not alarms(report_on(tmp_path, {**clean(2), "odd.weight": odd}))


def test_margins_drawn_for_each_weight_leave_a_trace(tmp_path: Path) -> None:
    tensors = clean()
    uniform = torch.rand(64, 512, generator=torch.Generator().manual_seed(2))
    low, high = (boxes(tensors["layers.0.weight"], [FORMATS["int8-rowwise"]], keep=keep) for keep in (0.2, 0.9))
    tensors["layers.0.weight"] = tensors["layers.0.weight"].clamp(
        low.lower.lerp(high.lower, uniform), low.upper.lerp(high.upper, uniform)
    )
    assert alarms(report_on(tmp_path, tensors))


def test_what_is_weak_in_each_tensor_is_found_in_all_together(tmp_path: Path) -> None:
    tensors = {}
    for index in range(40):
        tensor = weights(index)
        tensors[f"layers.{index}.weight"] = torch.cat(
            [tensor[:-2], attacked(tensor, FORMATS["int8-rowwise"], 0.8)[-2:]]
        )
    found = alarms(report_on(tmp_path, tensors, full=True))
    assert [finding.statistic for finding in found] == ["pooled edge"]
    assert "0.40 steps" in found[0].message
    assert found[0].tensor is None


def test_a_repository_of_vectors_is_nothing_for_it(tmp_path: Path) -> None:
    report = report_on(tmp_path, {"norm.weight": torch.ones(512)})
    assert report.detectors[0].state == "not run"


@pytest.mark.real_model
@pytest.mark.parametrize("off_grid", [False, True])
def test_a_real_model_is_clean(off_grid: bool) -> None:
    report = ONLY(smollm2_path(off_grid=off_grid))
    assert report.verdict == "clean"
    assert any(finding.format == "torchao-int4" for finding in report.findings)  # Q4_1's grid
