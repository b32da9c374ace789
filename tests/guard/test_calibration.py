"""Half-widths of a checkpoint, and the share of symbols that noise changes."""

from pathlib import Path

import pytest
import torch

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.guard.calibration import (
    calibrate,
    name_pattern,
    quartiles,
    share_changed_at_half_width,
)
from optimum_qguard.guard.noise import draw
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.guard.targets import find_targets


@pytest.mark.parametrize("format", ["bnb-int8", "nf4", "gguf-q4_0", "gguf-q4_k_m", "fp8-e4m3-row"])
def test_the_expected_share_is_what_drawn_noise_changes(tiny_llama: Path, format: str) -> None:
    if format.startswith("gguf"):
        pytest.importorskip("gguf")
        pytest.importorskip("libgguf")
    reader = open_checkpoint(tiny_llama)
    calibration = calibrate(reader, format, samples=1 << 20)
    assert calibration.sample is not None
    for factor in (0.3, 1.0, 3.0):
        sigma = factor * calibration.global_half_width
        changed = weights = 0.0
        for target in find_targets(reader, format).values():
            weight = reader.read(target.name).float()
            drawn = draw(weight, target.format, "gaussian", RandomStream(1, target.name), amplitude=sigma)
            changed += drawn.share_changed * target.weights
            weights += target.weights
        assert calibration.sample.share_changed(sigma) == pytest.approx(changed / weights, abs=0.01)


def test_the_closed_form_is_an_integral() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    residual = torch.linspace(-1, 1, 200001, dtype=torch.float64)
    stay = (normal.cdf(1 - residual) - normal.cdf(-1 - residual)).mean()
    assert share_changed_at_half_width() == pytest.approx(1 - float(stay), abs=1e-5)
    assert share_changed_at_half_width() == pytest.approx(0.390, abs=0.0005)


def test_only_fine_grids_have_the_closed_form(tiny_llama: Path) -> None:
    reader = open_checkpoint(tiny_llama)
    assert calibrate(reader, "int8-rowwise", samples=1000).has_closed_form
    assert not calibrate(reader, "nf4", samples=1000).has_closed_form
    assert calibrate(reader, "int8-rowwise").sample is None


def test_sampling_does_not_change_the_half_widths(tiny_llama: Path) -> None:
    reader = open_checkpoint(tiny_llama)
    assert calibrate(reader, "nf4", samples=1000).tensors == calibrate(reader, "nf4").tensors


def test_the_sample_is_of_every_size_that_is_asked_for(tiny_llama: Path) -> None:
    reader = open_checkpoint(tiny_llama)
    for samples in (3_000, 10_000, 1 << 20):
        sample = calibrate(reader, "int8-rowwise", samples=samples).sample
        assert sample is not None
        total = sum(tensor.weights for tensor in calibrate(reader, "int8-rowwise").tensors)
        assert min(samples, total) / 3 <= len(sample.values) <= 3 * min(samples, total)


def test_progress_ends_where_everything_is_done(tiny_llama: Path) -> None:
    steps: list[tuple[int, int]] = []
    calibration = calibrate(open_checkpoint(tiny_llama), "nf4", progress=lambda *step: steps.append(step))
    assert len(steps) == len(calibration.tensors)
    assert steps[-1][0] == steps[-1][1] == sum(tensor.weights for tensor in calibration.tensors)


def test_names_and_quartiles() -> None:
    assert name_pattern("h.0.attn.experts.11.w1.weight") == "h.*.attn.experts.*.w1.weight"
    assert name_pattern("fc1.weight") == "fc1.weight"
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (1, 2, 3, 4, 5)
