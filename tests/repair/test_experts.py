"""Experts, which a model holds in one tensor and its checkpoint one by one, are held like other weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_anchor import assert_gradient_is_that_of, train
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from optimum_qguard import AnchorCallback
from optimum_qguard.repair.anchor import Anchor
from optimum_qguard.repair.errors import RepairError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral(seed: int = 0, **options: Any) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_hidden_layers": 1, "num_local_experts": 3, **options}))


def qwen(seed: int = 0, **options: Any) -> Qwen3MoeForCausalLM:
    """One layer of experts, one dense."""
    torch.manual_seed(seed)
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **experts, "num_hidden_layers": 2, "head_dim": 8, **options}))


MODELS = {"mixtral": mixtral, "qwen": qwen}
HELD = {
    "mixtral": ["down_proj", "gate_up_proj", *"kqvo"],
    "qwen": ["down_proj", "gate_up_proj", *"kqvo", "down", "gate", "up", *"kqvo"],
}


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def clean(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / kind
    MODELS[kind](1).to(torch.bfloat16).save_pretrained(folder)
    assert any(".experts.1." in name for name in load_file(folder / "model.safetensors"))
    return folder


def test_gradient_is_that_of_the_loss_between_two_models(kind: str, clean: Path) -> None:
    """The clean weights here are those of the model that was saved, not of its file."""
    model, saved = MODELS[kind](), MODELS[kind](1).to(torch.bfloat16)
    anchor = Anchor.open(clean, model)
    shown = [name.removesuffix(".weight").rpartition(".")[2] for name in anchor.names]
    assert sorted(shown) == sorted(part if "_" in part else f"{part}_proj" for part in HELD[kind])
    parts = [
        (model.get_parameter(name) - saved.get_parameter(name).detach().float()).square().mean()
        for name in anchor.names
    ]
    loss = torch.stack(parts).mean()
    assert_gradient_is_that_of(loss, model, anchor)
    assert anchor.loss(model) == pytest.approx(float(loss), rel=1e-5)
    before = anchor.distance(model)
    anchor.pull(model, 2.0, [{"params": list(model.parameters()), "lr": 0.1}])
    assert anchor.distance(model) == pytest.approx(0.8 * before, rel=1e-5)


def test_trained(kind: str, clean: Path, tmp_path: Path) -> None:
    """Experts that no token was sent to have no gradient of the text, and are held all the same."""
    plain, held = MODELS[kind](), MODELS[kind]()
    train(plain, tmp_path)
    train(held, tmp_path, AnchorCallback(clean, strength=2.0, decoupled=True))
    anchor = Anchor.open(clean, held, modules=["experts"])
    assert sorted(name.rpartition(".")[2] for name in anchor.names) == ["down_proj", "gate_up_proj"]
    assert anchor.distance(held) == pytest.approx(0.9**4 * anchor.distance(MODELS[kind]()), rel=0.05)
    assert anchor.distance(plain) > 0.95 * anchor.distance(MODELS[kind]())


def test_saved_as_the_model_holds_them(kind: str, clean: Path, tmp_path: Path) -> None:
    MODELS[kind](1).to(torch.bfloat16).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any("experts.gate_up_proj" in name for name in load_file(tmp_path / "fused" / "model.safetensors"))
    model = MODELS[kind]()
    whole, parts = Anchor.open(tmp_path / "fused", model), Anchor.open(clean, model)
    assert whole.names == parts.names
    assert whole.measure(model) == parts.measure(model)


def test_patterns(kind: str, clean: Path) -> None:
    for pattern in ("up_proj", "gate_proj", "*.experts.*", "experts"):
        names = Anchor.open(clean, MODELS[kind](), modules=[pattern]).names
        assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert not any("experts" in name for name in Anchor.open(clean, MODELS[kind](), modules=["q_proj"]).names)


class TestBadInput:
    def test_other_shapes(self, kind: str, clean: Path) -> None:
        experts = "num_local_experts" if kind == "mixtral" else "num_experts"
        width = "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
        first = r"experts\.0\.\w+\.weight with those that belong to it is \(\d, \d+, 32\), and the model's is \(\d"
        for options in ({experts: 5}, {width: 40}):
            with pytest.raises(RepairError, match=first):
                Anchor.open(clean, MODELS[kind](**options))

    def test_experts_that_differ(self, kind: str, clean: Path, tmp_path: Path) -> None:
        model = MODELS[kind]()
        tensors = load_file(clean / "model.safetensors")
        name = next(name for name in tensors if "experts.1." in name)
        for wrong, says in [
            (tensors[name][1:].clone(), "do not go together"),
            (torch.full_like(tensors[name], torch.nan), f"{name} has values that are NaN"),
            (torch.zeros(tensors[name].shape, dtype=torch.int8), f"{name} is torch.int8"),
            (None, "do not go together|and the model's is"),
        ]:
            altered = {**tensors, name: wrong}
            kept = {each: tensor for each, tensor in altered.items() if tensor is not None}
            save_file(kept, tmp_path / "model.safetensors")
            with pytest.raises(RepairError, match=says) as caught:
                Anchor.open(tmp_path, model)
            assert "\n" not in str(caught.value)
        kept = {each: tensor for each, tensor in tensors.items() if ".experts." not in each}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(RepairError, match=r"has no tensor model\.layers\.0\.mlp\.experts\.\w+_proj"):
            Anchor.open(tmp_path, model)

    def test_adapters(self, kind: str, clean: Path) -> None:
        """On attention they are held, and the experts are not trained; on experts they are refused."""
        model = get_peft_model(MODELS[kind](), LoraConfig(target_modules=["q_proj"]))
        assert Anchor.open(clean, model).names == Anchor.open(clean, MODELS[kind]()).names
        experts = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
        with pytest.raises(RepairError, match="has adapters on experts; an anchor holds LoRA on linear layers only"):
            Anchor.open(clean, get_peft_model(MODELS[kind](), experts))
