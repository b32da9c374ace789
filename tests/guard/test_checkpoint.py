"""A full-precision checkpoint noised for a format: the quantizer, given it, chooses the symbols that were drawn."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.formats import Quantized, get_format
from optimum_qguard.formats.gguf_mixture import FILE_TYPES
from optimum_qguard.guard.calibration import calibrate
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.errors import QGuardError
from optimum_qguard.guard.noise import draw
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.guard.targets import find_targets

SEED = 5
GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def ggml(weight: Tensor, kind: str) -> Tensor:
    """The bytes that ggml stores."""
    libgguf = pytest.importorskip("libgguf")
    return torch.from_numpy(
        libgguf.quantize_rows(weight.float().contiguous().numpy(), libgguf.GGMLQuantizationType[kind.upper()])
    )


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("conversion", [torch.float32, torch.float16, torch.bfloat16])
def test_ggml_stores_what_was_drawn(tiny_llama: Path, tmp_path: Path, kind: str, conversion: torch.dtype) -> None:
    pytest.importorskip("gguf")
    report = guard_checkpoint(tiny_llama, tmp_path / "out", f"gguf-{kind}", seed=SEED)
    assert {tensor.method for tensor in report.tensors} == {"stochastic"}
    before, after = tensors(tiny_llama), tensors(tmp_path / "out")
    format = get_format(f"gguf-{kind}")
    for name in (GATE, QUERY, "model.embed_tokens.weight"):
        exact = draw(before[name], format, "stochastic", RandomStream(SEED, name), dtype=torch.float32).weight
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(ggml(after[name].to(conversion), kind), ggml(exact, kind))
        assert not torch.equal(ggml(after[name], kind), ggml(before[name], kind))


@pytest.mark.parametrize("file", [name for name in FILE_TYPES if name not in SIMPLE])
def test_k_quants_get_noise_of_their_half_widths_and_others_their_grid(
    tiny_llama: Path, tmp_path: Path, file: str
) -> None:
    pytest.importorskip("libgguf")
    pytest.importorskip("gguf")
    report = guard_checkpoint(tiny_llama, tmp_path / "out", f"gguf-{file}")
    by_name = {tensor.name: tensor for tensor in report.tensors}
    target = find_targets(open_checkpoint(tiny_llama), f"gguf-{file}")[DOWN]
    blocks = target.format.blocks(tensors(tiny_llama)[DOWN])
    grid = target.format.grid(blocks)
    shape = tensors(tiny_llama)[DOWN].shape
    width = Quantized(target.format, grid, target.format.encode(blocks, grid), shape).half_widths()
    assert by_name[DOWN].method == "uniform"
    assert by_name[DOWN].amplitude is None
    before, after = tensors(tiny_llama)[DOWN].float(), tensors(tmp_path / "out")[DOWN].float()
    assert float(((after - before) / width).std()) == pytest.approx(3**-0.5, rel=0.05)
    stored = 2**-8 * after.abs()  # bfloat16's rounding
    assert bool(((after - before).abs() <= 1.001 * width + stored).all())
    assert by_name[GATE].method == ("uniform" if file == "iq4_nl" else "stochastic")


def test_rows_are_independent_so_llama_cpp_may_permute_them(tiny_llama: Path) -> None:
    weight = tensors(tiny_llama)[DOWN]
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))
    for kind in ("q4_0", "q8_0", "q4_k", "q6_k"):
        assert torch.equal(ggml(weight[order], kind), ggml(weight, kind)[order])


def test_only_what_is_quantized_changes(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    report = guard_checkpoint(tiny_llama, tmp_path / "out", "gguf-q8_0")
    before, after = tensors(tiny_llama), tensors(tmp_path / "out")
    guarded = {tensor.name for tensor in report.tensors}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == guarded
    assert guarded == {name for name, weight in before.items() if weight.ndim == 2}
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()


def test_a_format_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    report = guard_checkpoint(tiny_llama, tmp_path / "out", "int8-rowwise", seed=SEED)
    assert {tensor.name for tensor in report.tensors} == {name for name in tensors(tiny_llama) if "proj" in name}
    format = get_format("int8-rowwise")
    before, after = tensors(tiny_llama)[GATE], tensors(tmp_path / "out")[GATE]
    exact = draw(before, format, "stochastic", RandomStream(SEED, GATE), dtype=torch.float32).weight
    assert torch.equal(format.quantize(after).codes, format.quantize(exact).codes)
    assert report.share_changed == pytest.approx(0.25, abs=0.02)


def test_global_noise(tiny_llama: Path, tmp_path: Path) -> None:
    report = guard_checkpoint(tiny_llama, tmp_path / "out", "nf4", noise="global", multiplier=0.5)
    sigma = calibrate(open_checkpoint(tiny_llama), "nf4").global_half_width
    assert {tensor.amplitude for tensor in report.tensors} == {0.5 * sigma}


def test_the_seed_decides(tiny_llama: Path, tmp_path: Path) -> None:
    for name, seed in [("one", 1), ("again", 1), ("two", 2), ("fresh", None)]:
        guard_checkpoint(tiny_llama, tmp_path / name, "nf4", seed=seed)
    content = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "two", "fresh")}
    assert content["one"] == content["again"]
    assert len(set(content.values())) == 3


def spoiled(tiny_llama: Path, folder: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    save_file({**tensors(tiny_llama), **changes}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_grid_that_bfloat16_cannot_hold_gets_noise(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    far = (10 + torch.rand(256, 128, generator=torch.Generator().manual_seed(0))).bfloat16()
    model = spoiled(tiny_llama, tmp_path / "model", {GATE: far})
    report = guard_checkpoint(model, tmp_path / "out", "gguf-q5_1")
    assert {tensor.name for tensor in report.tensors if tensor.method == "uniform"} == {GATE}
    with pytest.raises(ValueError, match="gate_proj"):
        guard_checkpoint(model, tmp_path / "none", "gguf-q5_1", method="stochastic")
    assert not (tmp_path / "none").exists()


def test_a_tensor_that_llama_cpp_does_not_know_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = spoiled(tiny_llama, tmp_path / "model", {"model.layers.0.new.weight": torch.ones(32, 32)})
    with pytest.raises(QGuardError, match=r"model\.layers\.0\.new\.weight"):
        guard_checkpoint(model, tmp_path / "out", "gguf-q8_0")
    assert not (tmp_path / "out").exists()


def test_a_transposed_weight_is_noised_in_its_own_orientation(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).save_pretrained(
        tmp_path / "model"
    )
    report = guard_checkpoint(tmp_path / "model", tmp_path / "out", "gguf-q8_0", seed=SEED)
    name = "transformer.h.0.mlp.c_fc.weight"
    before, after = tensors(tmp_path / "model")[name], tensors(tmp_path / "out")[name]
    assert before.shape == (64, 256)
    exact = draw(before.T, get_format("gguf-q8_0"), "stochastic", RandomStream(SEED, name)).weight
    assert torch.equal(after.T, exact)
    assert "transformer.wpe.weight" not in {tensor.name for tensor in report.tensors}


@pytest.mark.parametrize("format", ["gguf-q4_0", "nf4"])
def test_experts(tmp_path: Path, format: str) -> None:
    pytest.importorskip("gguf")
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        vocab_size=64,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    report = guard_checkpoint(tmp_path / "model", tmp_path / "out", format)
    names = {tensor.name for tensor in report.tensors}
    experts = {name for name in tensors(tmp_path / "model") if ".experts." in name}
    assert len(experts) >= 2
    assert experts <= names
    if format.startswith("gguf"):
        assert not any(name.endswith("gate.weight") for name in names)


def test_errors_are_fed_back_in_a_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As GPT-2's on the Hub: the tensors' names are not the model's."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=128, vocab_size=300)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "with")
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "with").items()}
    save_file(plain, tmp_path / "without" / "model.safetensors", {"format": "pt"})
    for name in ("with", "without"):
        options: dict[str, Any] = {"compensate": "auto", "seed": SEED}
        report = guard_checkpoint(tmp_path / name, tmp_path / f"{name}-out", "int8-rowwise", **options)
        assert {tensor.method for tensor in report.tensors} == {"compensated"}
        assert len(report.tensors) == 4
