import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_cyclic import Tokens, arguments, gpt2, labels_of, llama, train
from transformers import Trainer

from optimum_qguard.precision.adapters import WidthAdapters
from optimum_qguard.precision.cyclic import CyclicPrecisionCallback
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.fake_quantization import FakeQuantization
from optimum_qguard.precision.joint import JointPrecisionTrainer, joint_loss

ROWS = Tokens(6).rows
LABELS = labels_of(ROWS).masked_fill(torch.arange(12) > 8, -100)
BATCH = {"input_ids": ROWS, "labels": LABELS}


def _logits(make: Any, bits: int) -> torch.Tensor:
    model = make().eval()
    FakeQuantization(model, bits=bits)
    return model(ROWS).logits


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("consistency", [0.0, 0.7])
def test_joint_loss_is_the_sum_of_separate_ones(make: Any, consistency: float) -> None:
    widths = (4, 8, 3)
    model = make().eval()
    layers = FakeQuantization(model, bits=5)
    loss = joint_loss(model, BATCH, widths, layers=layers, consistency=consistency)
    loss.backward()
    assert layers.bits == 5

    expected = torch.zeros(())
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    reference = _logits(make, 8).detach().softmax(-1)
    for bits in widths:
        other = make().eval()
        FakeQuantization(other, bits=bits)
        outputs = other(**BATCH)
        probabilities = outputs.logits.softmax(-1)
        per_token = (reference * (reference / probabilities).log()).sum(-1)[:, :-1]
        term = outputs.loss + consistency * per_token[LABELS[:, 1:] != -100].mean() * (bits != 8)
        term.backward()
        expected += term.detach()
        for total, parameter in zip(gradients, other.parameters(), strict=True):
            total += parameter.grad
    torch.testing.assert_close(loss.detach(), expected)
    for parameter, total in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_steps_along_it(accumulate: int, tmp_path: Path) -> None:
    model, twin = gpt2(), gpt2()
    settings = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = JointPrecisionTrainer(
        model, settings, train_dataset=Tokens(8), eval_dataset=Tokens(8), widths=(8, 3), consistency=0.5
    )
    trainer.train()
    rows = Tokens(8).rows
    layers = FakeQuantization(twin)
    batch = {"input_ids": rows, "labels": labels_of(rows)}
    joint_loss(twin, batch, (8, 3), layers=layers, consistency=0.5).backward()
    # Gradients are rounded to 8 bits of each token's own, so that the batch's size does not matter.
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - 0.5 * other.grad, rtol=1e-3, atol=1e-4)
    layers.remove()
    twin.load_state_dict(model.state_dict())
    evaluated = next(record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record)
    assert evaluated == pytest.approx(float(twin(**batch).loss.detach()), rel=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def _config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)


def _adapter_weights(model: Any) -> dict[int, torch.Tensor]:
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    return {bits: layer.lora_A[f"bits{bits}"].weight.detach().clone() for bits in (3, 4, 5, 6)}


def test_an_adapter_learns_at_its_own_width_only(tmp_path: Path) -> None:
    adapters = WidthAdapters(gpt2(), (3, 4, 5, 6), _config())
    before, moved = _adapter_weights(adapters.model), []

    class Watch(CyclicPrecisionCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            after = _adapter_weights(adapters.model)
            moved.append([bits for bits in after if not torch.equal(after[bits], before[bits])])
            before.update(after)

    base = adapters.model.base_model.model.transformer.h[0].mlp.c_fc.weight.clone()
    trainer = train(
        adapters.model,
        tmp_path,
        Watch(3, 6, cycles=2, schedule="linear", adapters=adapters, evaluation_bits=6),
        optim="adamw_torch",
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    bits = [record["bits"] for record in trainer.state.log_history if "loss" in record]
    assert bits == [3, 4, 4, 5] * 2
    assert moved == [[each] for each in bits], "not even by weight decay or momentum"
    assert torch.equal(base, adapters.model.base_model.model.transformer.h[0].mlp.c_fc.weight)
    assert adapters.model.active_adapter == "bits6", "as evaluation has it"


def test_what_an_adapter_adds_is_added_to_the_rounded_layer() -> None:
    adapters = WidthAdapters(gpt2(), (4, 8), _config())
    model = adapters.model.eval()
    layers = FakeQuantization(model)
    assert len(layers.names) == 8
    assert not any("lora" in name for name in layers.names)
    assert FakeQuantization(WidthAdapters(gpt2(), (4,), _config()).model, modules=["h.0.attn.c_attn"]).names == (
        "base_model.model.transformer.h.0.attn.c_attn.base_layer",
    )
    plain = gpt2().eval()
    FakeQuantization(plain, bits=4)
    adapters.switch(4)
    with layers.at(4):
        assert not torch.allclose(model(ROWS).logits, plain(ROWS).logits, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ROWS).logits, plain(ROWS).logits)
        at4 = model(ROWS).logits
        adapters.switch(8)
        assert not torch.allclose(model(ROWS).logits, at4, atol=1e-3)


def test_joint_training_gives_each_adapter_its_own_loss() -> None:
    adapters = WidthAdapters(gpt2(), (4, 8), _config())
    layers = FakeQuantization(adapters.model, backward_bits=None)
    joint_loss(adapters.model, BATCH, (8, 4), layers=layers, adapters=adapters).backward()
    joint = {name: parameter.grad.clone() for name, parameter in adapters.model.named_parameters() if "lora" in name}
    adapters.model.zero_grad()
    for bits in (4, 8):
        adapters.switch(bits)
        with layers.at(bits):
            adapters.model(**BATCH).loss.backward()
    for name, parameter in adapters.model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(parameter.grad, joint[name], msg=name)
            assert parameter.grad.abs().sum() > 0


def test_what_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    layers = FakeQuantization(model)
    for widths, options, message in (
        ((8,), {}, "needs two different widths"),
        ((8, 8), {}, "needs two different widths"),
        ((8, 1), {}, "joint training has 1 bits"),
        ((8, 4), {"consistency": -1.0}, "a consistency of -1: needs 0 or more"),
        ((8, 4), {"consistency": float("nan")}, "needs 0 or more"),
    ):
        with pytest.raises(PrecisionError, match=message):
            joint_loss(model, BATCH, widths, layers=layers, **options)
        with pytest.raises(PrecisionError, match=message):
            JointPrecisionTrainer(model, arguments(tmp_path), widths=widths, **options)
    message = "a batch has input_ids and no labels; joint training needs them"
    with pytest.raises(PrecisionError, match=message):
        joint_loss(model, {"input_ids": ROWS}, (8, 4), layers=layers)
    layers.remove()
    unlabelled = [{"input_ids": row} for row in ROWS]
    with pytest.raises(PrecisionError, match=message):
        JointPrecisionTrainer(model, arguments(tmp_path), train_dataset=unlabelled).train()
    layers = FakeQuantization(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(PrecisionError, match="gradient checkpointing computes again in the backward pass"):
        joint_loss(model, BATCH, (8, 4), layers=layers)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"adapters need peft; run: pip install 'optimum-qguard\[adapters\]'"):
        WidthAdapters(gpt2(), (4,), config)


def test_adapters_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="no widths"):
        WidthAdapters(gpt2(), (), _config())
    with pytest.raises(PrecisionError, match="an adapter has 9 bits"):
        WidthAdapters(gpt2(), (9,), _config())
    adapters = WidthAdapters(gpt2(), (4, 8), _config())
    with pytest.raises(PrecisionError, match="no adapter for 3, 5 bits; there are adapters for 4, 8"):
        adapters.require((3, 4, 5))
    with pytest.raises(PrecisionError, match="no adapter for 3, 5, 6, 7 bits"):
        Trainer(
            adapters.model,
            arguments(tmp_path, max_steps=20),
            train_dataset=Tokens(32),
            callbacks=[CyclicPrecisionCallback(cycles=1, adapters=adapters)],
        ).train()
