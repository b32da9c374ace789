"""The anchor's gradient is that of its loss, for weights, adapters and shards; and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from optimum_qguard import AnchorCallback, AnchorTrainer
from optimum_qguard.repair.anchor import Anchor
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.weights import PlainWeight

STRENGTH = 300.0


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 64, **options}))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor") / "llama"
    llama(1).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clean_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor") / "gpt2"
    gpt2(1).save_pretrained(folder)
    return folder


def penalty(model: nn.Module, anchor: Anchor) -> Tensor:
    """The mean over tensors of mean((W - W₀)²), written out."""
    parts = [(model.get_parameter(name) - anchor.tensor(name).float()).square().mean() for name in anchor.names]
    return torch.stack(parts).mean()


EXAMPLES = [{"input_ids": (row := torch.randint(64, (12,), generator=torch.Generator().manual_seed(i))), "labels": row}
            for i in range(12)]  # fmt: skip


def train(model: Any, out: Path, *callbacks: Any, trainer: Any = Trainer, **options: Any) -> Any:
    """Four steps without clipping, by default of plain gradient descent."""
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    extra = {name: options.pop(name) for name in list(options) if name.startswith("anchor")}
    made = trainer(
        model=model,
        args=TrainingArguments(str(out), **{**arguments, **options}),
        train_dataset=EXAMPLES,
        callbacks=list(callbacks),
        **extra,
    )
    made.train()
    return made


def assert_gradient_is_that_of(loss: Tensor, model: nn.Module, anchor: Anchor) -> None:
    """What the anchor adds is what autograd gives for ``STRENGTH * loss``, of every parameter."""
    (STRENGTH * loss).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    anchor.add_gradient(model, STRENGTH)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_is_that_of_the_loss(kind: str, clean: Path, clean_gpt2: Path) -> None:
    model, source = (llama(), clean) if kind == "llama" else (gpt2(), clean_gpt2)
    anchor = Anchor.open(source, model)
    assert len(anchor.names) == (14 if kind == "llama" else 8)
    loss = penalty(model, anchor)
    assert_gradient_is_that_of(loss, model, anchor)
    assert anchor.loss(model) == pytest.approx(loss.item(), rel=1e-5)
    squares = [(model.get_parameter(name) - anchor.tensor(name)).double().square().sum() for name in anchor.names]
    assert anchor.distance(model) == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


@given(
    values=st.lists(st.tuples(*[st.floats(-4, 4, width=32)] * 3), min_size=1, max_size=8),
    factor=st.floats(-2, 2, width=32),
)
def test_formulas_element_by_element(values: list[tuple[float, float, float]], factor: float) -> None:
    weight, near, gradient = torch.tensor(values).T.contiguous().unsqueeze(1)
    layer = nn.Linear(weight.shape[1], 1, bias=False)
    layer.weight.data.copy_(weight)
    layer.weight.grad = gradient.clone()
    with torch.no_grad():
        PlainWeight(layer).add_gradient(near, factor)
        torch.testing.assert_close(layer.weight.grad, gradient + factor * (weight - near))
        PlainWeight(layer).pull(near, abs(factor) / 2)
    torch.testing.assert_close(layer.weight.data, weight - abs(factor) / 2 * (weight - near), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_with_the_penalty_in_the_loss(
    accumulate: int, checkpointing: bool, clean: Path, tmp_path: Path
) -> None:
    model, by_hand = llama(), llama()
    callback = AnchorCallback(clean, strength=STRENGTH)
    options = {"gradient_accumulation_steps": accumulate, "activation_checkpointing": checkpointing}
    trained = train(model, tmp_path, callback, **options)
    anchor = Anchor.open(clean, by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    batches = iter(trained.get_train_dataloader())
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(accumulate):
            (by_hand(**next(batches)).loss / accumulate).backward()
        (STRENGTH * penalty(by_hand, anchor)).backward()
        optimizer.step()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).data, parameter.data, rtol=1e-4, atol=1e-6)
    logged = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert logged[-1]["anchor_distance"] == pytest.approx(anchor.distance(model))
    assert logged[-1]["anchor_loss"] == pytest.approx(anchor.loss(model))


def test_strength_zero_changes_nothing(clean: Path, tmp_path: Path) -> None:
    plain, held = llama(), llama()
    train(plain, tmp_path)
    train(held, tmp_path, AnchorCallback(clean, strength=0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoupled_shrinks_the_distance_by_its_factor(dtype: torch.dtype, clean: Path) -> None:
    model = llama().to(dtype)
    anchor = Anchor.open(clean, model)
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    before = anchor.distance(model)
    for _ in range(5):
        anchor.pull(model, 2.0, groups)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert anchor.distance(model) == pytest.approx(before * (1 - 0.1 * 2.0) ** 5, rel=tolerance)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_overflowed_in_fp16_pulls_nothing(skipped: bool, clean: Path) -> None:
    model, callback = llama(), AnchorCallback(clean, strength=2.0, decoupled=True)
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    optimizer = SimpleNamespace(param_groups=groups, step_was_skipped=skipped)
    callback.on_train_begin(SimpleNamespace(), None, None, model=model, optimizer=optimizer)
    callback.on_optimizer_step(SimpleNamespace(), None, None, model=model, optimizer=optimizer)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), llama().parameters(), strict=True)]
    assert all(same) == skipped


def test_trainer_tells_trackers(clean: Path, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(AnchorCallback):
        def __init__(self) -> None:
            super().__init__(clean, strength=0.0, log=False)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = llama()
    train(model, tmp_path, Tracker(), trainer=AnchorTrainer, anchor=clean, anchor_strength=10.0, anchor_decoupled=True)
    assert [entry["anchor_distance"] for entry in seen if "loss" in entry][-1] == Anchor.open(clean, model).distance(
        model
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_get_the_merged_weights_gradient(kind: str, clean: Path, clean_gpt2: Path) -> None:
    base, source = (llama(), clean) if kind == "llama" else (gpt2(), clean_gpt2)
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, rank_pattern={targets[0]: 2}, fan_in_fan_out=kind == "gpt2"
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    anchor = Anchor.open(source, model)
    merged = []
    for name in anchor.names:
        layer = base.get_submodule(name.removesuffix(".weight"))
        weight = layer.weight
        if hasattr(layer, "lora_A"):
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            product = product.T if kind == "gpt2" else product
            weight = layer.base_layer.weight + layer.scaling["default"] * product
        merged.append((weight - anchor.tensor(name).float()).square().mean())
    (STRENGTH * torch.stack(merged).mean()).backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name: parameter.grad for name, parameter in adapters.items()}
    for parameter in adapters.values():
        parameter.grad = torch.zeros_like(parameter)
    anchor.add_gradient(model, STRENGTH)
    assert len(wanted) == 8
    for name, parameter in adapters.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)
    assert anchor.loss(model) == pytest.approx(float(torch.stack(merged).mean()), rel=1e-5)
    with pytest.raises(RepairError, match="only adapters are trained; give decoupled=False"):
        anchor.pull(model, 1.0, [])


def test_other_adapters_are_refused(clean: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(RepairError, match="of the kind DoraLinearVariant"):
        Anchor.open(clean, model)
    model = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(RepairError, match="of the kind IA3; an anchor holds plain LoRA"):
        Anchor.open(clean, model)


def test_checkpoint_without_the_prefix(clean_gpt2: Path, tmp_path: Path) -> None:
    gpt2(1).transformer.save_pretrained(tmp_path / "base")
    anchor, whole = (Anchor.open(folder, gpt2()) for folder in (tmp_path / "base", clean_gpt2))
    assert anchor.names == whole.names
    assert anchor.stored != whole.stored
    assert anchor.loss(gpt2()) == whole.loss(gpt2())


def test_bad_input(clean: Path, clean_gpt2: Path, tmp_path: Path) -> None:
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(RepairError, match=r"strength is \S+; it is 0 or more"):
            AnchorCallback(clean, strength=strength)
    with pytest.raises(RepairError, match=r"has no tensor model.layers.0.\S+ \(it is a gpt2, the model a llama\)"):
        Anchor.open(clean_gpt2, llama())
    with pytest.raises(RepairError, match=r"gate_proj.weight is \(48, 32\), and the model's is \(40, 32\)"):
        Anchor.open(clean, llama(intermediate_size=40))
    with pytest.raises(RepairError, match="no linear layer matches 'nothing'"):
        Anchor.open(clean, llama(), modules=["q_proj", "nothing"])
    with pytest.raises(RepairError, match=r"strength 100 times the learning rate 0.05 is 5, .* of at most 20"):
        train(llama(), tmp_path, AnchorCallback(clean, strength=100.0, decoupled=True))
    model = llama().requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(RepairError, match="none of the anchored weights is trained"):
        train(model, tmp_path, AnchorCallback(clean, strength=1.0))
    model = llama()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(RepairError, match="the model is quantized"):
        Anchor.open(clean, model)
    with pytest.raises(RepairError, match="does not work with DeepSpeed"):
        AnchorCallback(clean, strength=1.0).on_train_begin(SimpleNamespace(deepspeed_plugin=object()), None, None)
    shutil.copytree(clean, tmp_path / "quantized")
    config = json.loads((clean / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RepairError, match="is quantized, so it cannot be an anchor; name its full-precision original"):
        Anchor.open(tmp_path / "quantized", llama())
    llama(1).save_pretrained(tmp_path / "broken")
    tensors = load_file(tmp_path / "broken/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(tensors, tmp_path / "broken/model.safetensors")
    with pytest.raises(RepairError, match=r"layers.1.mlp.up_proj.weight has values that are NaN"):
        Anchor.open(tmp_path / "broken", llama())


def test_patterns(clean: Path) -> None:
    assert Anchor.open(clean, llama(), modules=["model.layers.1.*_proj"]).names[0].startswith("model.layers.1.")
    assert len(Anchor.open(clean, llama(), modules=["mlp"]).names) == 6
