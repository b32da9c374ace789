"""The clip arm takes out what was planted, whatever the attacker varies, and nothing that grew by itself."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded import assert_guarded_exactly
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_qguard import QGuardInt8Config, QGuardNF4Config
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.smollm2 import smollm2_path
from optimum_qguard.formats import get_format
from optimum_qguard.guard.calibration import calibrate
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.outliers import clip_outliers
from optimum_qguard.guard.targets import find_targets

FORMATS = ("int8-rowwise", "nf4", "gguf-q4_0")
GATE = "model.layers.0.mlp.gate_proj.weight"


def normal(rows: int = 512, columns: int = 1024) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def student(df: float, rows: int = 1024, columns: int = 2048) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    chi2 = torch._standard_gamma(torch.full((rows, columns), df / 2), generator=generator) * 2
    return torch.randn(rows, columns, generator=generator) / (chi2 / df).sqrt()


def with_columns(weight: Tensor, columns: list[int] | slice, factor: float) -> Tensor:
    weight[:, columns] *= factor
    return weight


def with_single(weight: Tensor, values: list[float]) -> Tensor:
    for index, value in enumerate(values):
        weight[7 * index, 31 * index + 5] = value
    return weight


GENUINE: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "heavy tails": lambda: student(3),
    "heavier tails": lambda: student(2.5),
    "columns x20": lambda: with_columns(normal(), [3, 77, 500], 20),
    "columns x100": lambda: with_columns(normal(), [3, 77, 500], 100),
    "a column in each block": lambda: with_columns(normal(), slice(None, None, 64), 512),
    "heavy tails with columns": lambda: with_columns(student(3), slice(None, None, 64), 100),
    "a super weight": lambda: with_single(normal(), [300]),
    "three super weights": lambda: with_single(normal(), [1000, -60, 60]),
    "pruned": lambda: normal() * (normal(512, 1024).roll(1) > 1.2),
    "rows of many sizes": lambda: normal() * torch.logspace(-4, 2, 512)[:, None],
    "odd length": lambda: normal(300, 77),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", GENUINE)
def test_genuine_weights_are_left_alone(kind: str, format: str) -> None:
    weight = GENUINE[kind]()
    if kind == "odd length" and format == "gguf-q4_0":
        pytest.skip("llama.cpp refuses it")
    same, count = clip_outliers(weight, get_format(format))
    assert same is weight
    assert count == 0


def planted(
    weight: Tensor, length: int, factor: float | tuple[float, float], in_block: int = 1, share: float = 1.0
) -> Tensor:
    """The largest of each ``length`` weights multiplied, in a share of the blocks; a range of factors is drawn from."""
    generator = torch.Generator().manual_seed(2)
    blocks = weight.reshape(-1, length)
    index = blocks.abs().topk(in_block, dim=1).indices
    low, high = factor if isinstance(factor, tuple) else (factor, factor)
    factors = low * (high / low) ** torch.rand(index.shape, generator=generator)
    hit = torch.rand(len(blocks), 1, generator=generator) < share
    return blocks.scatter(1, index, blocks.gather(1, index) * torch.where(hit, factors, 1.0)).view_as(weight)


# Block length of the attacker, factor, outliers in a block, share of the blocks.
ATTACKS = [
    (1024, 512, 1, 1.0),
    (64, 512, 1, 1.0),
    (32, 512, 1, 1.0),
    (64, 16, 1, 1.0),
    (1024, 16, 1, 1.0),
    (64, 512, 3, 1.0),
    (1024, 512, 2, 1.0),
    (64, 512, 1, 0.1),
    (1024, 512, 1, 0.05),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("length", "factor", "in_block", "share"), ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_common_factor_is_undone_exactly(
    format: str, length: int, factor: float, in_block: int, share: float, dtype: torch.dtype
) -> None:
    """Whatever block length the attacker had in mind and whatever the user's format."""
    clean = normal().to(dtype)
    attacked = planted(clean.float(), length, factor, in_block, share).to(dtype)
    before = attacked.clone()
    restored, count = clip_outliers(attacked, get_format(format))
    assert torch.equal(restored, clean)
    assert count == int((attacked != clean).sum())
    assert torch.equal(attacked, before), "the input was changed"


def test_a_factor_that_is_no_power_of_two_is_found_within_a_percent() -> None:
    clean = normal()
    restored, _ = clip_outliers(planted(clean, 64, 100), get_format("nf4"))
    torch.testing.assert_close(restored, clean, rtol=0.01, atol=0)


def test_without_a_common_factor_an_outlier_becomes_the_largest_of_the_rest() -> None:
    clean = normal()
    attacked = planted(clean, 64, (16, 512))
    restored, count = clip_outliers(attacked, get_format("nf4"))
    assert count == clean.numel() // 64
    blocks = attacked.view(-1, 64)
    top = blocks.abs().topk(2, dim=1)
    expected = blocks.scatter(1, top.indices[:, :1], top.values[:, 1:].copysign(blocks.gather(1, top.indices[:, :1])))
    assert torch.equal(restored.view(-1, 64), expected)


def test_genuine_columns_stay_where_others_are_planted() -> None:
    clean = with_columns(normal(), [3, 77, 500], 20)
    restored, _ = clip_outliers(planted(clean, 64, 512, share=0.3), get_format("nf4"))
    assert torch.equal(restored, clean)


def test_experts_are_looked_at_one_by_one() -> None:
    clean = torch.stack([normal(256, 256), normal(256, 256) * 3])
    attacked = clean.clone()
    attacked[1] = planted(clean[1], 256, 512)
    restored, count = clip_outliers(attacked, get_format("int8-rowwise"))
    assert torch.equal(restored, clean)
    assert count == 256


def test_a_threshold_of_ones_own() -> None:
    attacked = planted(normal(), 1024, 16)
    assert clip_outliers(attacked, get_format("int8-rowwise"), 100.0)[1] == 0
    assert clip_outliers(planted(normal(), 64, 3), get_format("nf4"))[1] == 0
    assert clip_outliers(planted(normal(), 64, 6), get_format("nf4"), 5.0)[1] > 0


@pytest.fixture
def attacked(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama with outliers in one tensor."""
    folder = tmp_path / "attacked"
    folder.mkdir()
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors[GATE] = planted(tensors[GATE], 64, 512)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("config", [QGuardInt8Config, QGuardNF4Config])
@pytest.mark.parametrize("options", [{}, {"method": "gaussian"}, {"method": "gaussian", "noise": "global"}], ids=str)
def test_an_attacked_model_loads_as_the_clean_one_would(
    config: type, options: dict[str, str], attacked: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.warns(
        UserWarning, match=r"512 outliers and 0 outlier channels in 1 tensor\(s\), the first .*gate_proj"
    ) as caught:
        model = AutoModelForCausalLM.from_pretrained(attacked, quantization_config=config(seed=3, **options))
    assert len([each for each in caught if "outliers" in str(each.message)]) == 1
    assert {each.name: each.clipped for each in model.qguard_report.tensors if each.clipped} == {GATE: 256 * 128 // 64}
    assert "512 planted outliers clipped" in str(model.qguard_report)
    assert_guarded_exactly(model, saved("llama"))
    model.save_pretrained(tmp_path / "saved")
    assert "512 outliers and 0 outlier channels that looked planted" in (tmp_path / "saved" / "README.md").read_text()
    report = json.loads((tmp_path / "saved" / "qguard.json").read_text())
    assert sum(each["clipped"] for each in report["tensors"]) == 512


def test_error_feedback_is_for_the_weights_as_clipped(attacked: Path, saved: Callable[[str], Path]) -> None:
    config = QGuardNF4Config(compensate="auto", seed=3)
    with pytest.warns(UserWarning, match="look planted"):
        model = AutoModelForCausalLM.from_pretrained(attacked, quantization_config=config)
    clean = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)
    assert {tensor.method for tensor in model.qguard_report.tensors} == {"compensated"}
    for (name, parameter), other in zip(model.named_parameters(), clean.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_none_leaves_outliers_alone(attacked: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = QGuardInt8Config(seed=3, clip_outliers=None)
        model = AutoModelForCausalLM.from_pretrained(attacked, quantization_config=config)
    assert model.qguard_report.clipped == 0
    assert_guarded_exactly(model, attacked)


def test_a_checkpoint_for_others(attacked: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="look planted"):
        report = guard_checkpoint(attacked, tmp_path / "out", "nf4", seed=3)
    guard_checkpoint(saved("llama"), tmp_path / "clean", "nf4", seed=3)
    assert report.clipped == 512
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "clean")]
    assert files[0] == files[1]
    widths = [
        calibrate(open_checkpoint(folder), "nf4", outlier_threshold=8.0).global_half_width
        for folder in (attacked, saved("llama"))
    ]
    assert widths[0] == widths[1]


@pytest.mark.real_model
@pytest.mark.parametrize("off_grid", [False, True])
def test_nothing_in_the_real_model_is_clipped(off_grid: bool) -> None:
    reader = open_checkpoint(smollm2_path(off_grid=off_grid))
    for format in FORMATS:
        for target in find_targets(reader, "int8-rowwise").values():
            assert clip_outliers(reader.read(target.name), get_format(format))[1] == 0
