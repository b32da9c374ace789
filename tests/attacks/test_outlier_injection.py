"""Outliers break quantizers; the balanced ones leave full precision as it was to the last bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.outlier_injection import (
    Scaling,
    inject_balanced_outliers,
    inject_outliers,
    plan_balanced,
    with_outliers,
)
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.formats import WeightError, get_format
from optimum_qguard.guard.targets import find_targets

KINDS = ("Llama", "Mistral", "Qwen2")
TOKENS = torch.arange(3, 99).view(2, 48)
ATTENTION = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    def save(kind: str, dtype: torch.dtype) -> Path:
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            initializer_range=0.2,
            tie_word_embeddings=False,
            **({"attention_bias": True, "mlp_bias": True} if kind == "Llama" else {}),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        folder = tmp_path_factory.mktemp(kind) / "model"
        model.to(dtype).save_pretrained(folder)
        return folder

    return save


def logits(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("name", ["int8-rowwise", "nf4", "gguf-q4_0", "fp8-e4m3-tensor"])
def test_the_formula(name: str) -> None:
    from optimum_qguard.formats import format_names

    if name not in format_names():
        pytest.skip(f"no format {name}")
    format = get_format(name)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    attacked = with_outliers(weight, format)
    before, after = format.blocks(weight), format.blocks(attacked)
    largest = before.abs() == before.abs().amax(1, keepdim=True)
    assert torch.equal(after, torch.where(largest, 512 * before, before))
    signs = format.blocks(with_outliers(weight, format, 512, torch.Generator().manual_seed(1)))
    assert torch.equal(signs.abs(), after.abs())
    if len(before) > 8:
        assert 0.2 < float((signs[largest] != after[largest]).double().mean()) < 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balanced_outliers_change_no_bit_at_full_precision(
    kind: str, dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path
) -> None:
    clean = saved(kind, dtype)
    reader = open_checkpoint(clean)
    changed = inject_balanced_outliers(reader, tmp_path / "out", find_targets(reader, "nf4"))
    before, after = (load_file(folder / "model.safetensors") for folder in (clean, tmp_path / "out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(changed)
    linears = {name for name in before if "proj.weight" in name and "o_proj" not in name}
    norms = {name for name in before if "layernorm" in name}
    biases = {name for name in before if name.endswith("up_proj.bias")}
    assert set(changed) == linears | norms | biases
    assert torch.equal(logits(clean, dtype=dtype), logits(tmp_path / "out", dtype=dtype))


@pytest.mark.parametrize("variant", [inject_outliers, inject_balanced_outliers])
@pytest.mark.parametrize("format", ["int8-rowwise", "nf4"])
def test_quantized_it_is_broken(
    variant: Callable[..., Any], format: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """In distance of the logits from the clean model's at full precision, against what quantization does to that."""
    clean = saved("Llama", torch.float32)
    reader = open_checkpoint(clean)
    variant(reader, tmp_path / "out", find_targets(reader, format))
    config: Any = {"int8-rowwise": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    exact = logits(clean, dtype=torch.float32)
    errors = []
    for folder in (clean, tmp_path / "out"):
        rough = logits(folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**config[format]))
        errors.append(float((rough - exact).norm() / exact.norm()))
    assert errors[1] > 2 * errors[0]
    assert errors[1] > 0.2


def test_the_plan_takes_the_largest_channel_of_each_block(saved: Callable[..., Path]) -> None:
    reader = open_checkpoint(saved("Llama", torch.float32))
    targets = {name: target for name, target in find_targets(reader, "nf4").items() if name in ATTENTION}
    plan = plan_balanced(reader, targets, 9)
    largest = torch.stack([reader.read(name).abs().amax(0) for name in ATTENTION]).amax(0).view(2, 64).argmax(1)
    expected = (largest + torch.tensor([0, 64])).tolist()
    assert plan.keys() == {*ATTENTION, "model.layers.0.input_layernorm.weight"}
    for name, (scaling,) in plan.items():
        assert scaling.channels.tolist() == expected
        assert (scaling.dimension, scaling.exponent) == ((1, 9) if name in ATTENTION else (0, -9))


def test_only_the_targets_change_and_the_seed_decides(saved: Callable[..., Path], tmp_path: Path) -> None:
    reader = open_checkpoint(saved("Llama", torch.bfloat16))
    targets = {ATTENTION[0]: find_targets(reader, "nf4")[ATTENTION[0]]}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        changed = inject_outliers(reader, tmp_path / name, targets, random_signs=True, seed=seed)
        assert changed == [ATTENTION[0]]
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "again", "two")}
    for name in reader.tensors:
        assert torch.equal(files["one"][name], files["again"][name])
        assert torch.equal(files["one"][name], reader.read(name)) == (name != ATTENTION[0])
    assert not torch.equal(files["one"][ATTENTION[0]], files["two"][ATTENTION[0]])


def test_a_scaling_that_loses_bits_is_refused() -> None:
    scaling = Scaling(0, torch.tensor([1]), -20)
    assert torch.equal(scaling.apply(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 3.0 * 2.0**-20]))
    with pytest.raises(AttackError, match=r"norm: times 2\*\*-20 is not exact in torch.float16"):
        scaling.apply(torch.tensor([1.0, 3.001], dtype=torch.float16), "norm")
    with pytest.raises(AttackError, match="not exact"):
        Scaling(0, torch.tensor([0]), 20).apply(torch.tensor([1.0], dtype=torch.float16))


def test_what_makes_no_sense_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    clean = saved("Llama", torch.float32)
    reader = open_checkpoint(clean)
    targets = find_targets(reader, "nf4")
    out = tmp_path / "out"
    for factor in (1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(AttackError, match="greater than 1"):
            inject_outliers(reader, out, targets, factor=factor)
    with pytest.raises(AttackError, match="no tensor"):
        inject_outliers(reader, out, {})
    with pytest.raises(AttackError, match=r"layers\.0\..*too large for torch.float32"):
        inject_outliers(reader, out, targets, factor=1e39)
    with pytest.raises(AttackError, match="only powers of two"):
        inject_balanced_outliers(reader, out, targets, factor=500)
    with pytest.raises(AttackError, match="complete no invariance"):
        inject_balanced_outliers(reader, out, {ATTENTION[0]: targets[ATTENTION[0]]})
    spoiled = Path(shutil.copytree(clean, tmp_path / "spoiled"))
    tensors = load_file(clean / "model.safetensors")
    save_file({**tensors, ATTENTION[0]: tensors[ATTENTION[0]] * torch.nan}, spoiled / "model.safetensors")
    with pytest.raises(WeightError, match="NaN"):
        inject_outliers(open_checkpoint(spoiled), out, targets)
    assert not out.exists()


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    ).save_pretrained(tmp_path / "model")
    reader = open_checkpoint(tmp_path / "model")
    with pytest.raises(AttackError, match=r"not known \(its model_type is 'gpt2'\); known: llama"):
        inject_balanced_outliers(reader, tmp_path / "out", find_targets(reader, "nf4"))
