import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from optimum_qguard.precision.cyclic import CyclicPrecisionCallback, scheduled_bits
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.fake_quantization import FakeQuantization


def labels_of(rows: torch.Tensor) -> torch.Tensor:
    """The Trainer divides GPT-2's loss by the number of labels, the first of which is never predicted."""
    labels = rows.clone()
    labels[..., 0] = -100
    return labels


class Tokens(Dataset):
    def __init__(self, n: int) -> None:
        self.rows = torch.randint(0, 50, (n, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": labels_of(self.rows[index])}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48, vocab_size=50
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return TrainingArguments(str(folder), **settings)


def train(model: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    trainer = Trainer(model, arguments(folder, **options), train_dataset=Tokens(32), callbacks=list(callbacks))
    trainer.train()
    return trainer


def logged_bits(trainer: Trainer) -> list[int]:
    return [record["bits"] for record in trainer.state.log_history if "loss" in record]


SCHEDULES = st.tuples(st.integers(2, 8), st.integers(2, 8), st.integers(1, 300), st.integers(1, 300)).map(
    lambda drawn: (min(drawn[:2]), max(drawn[:2]), min(drawn[2:]), max(drawn[2:]))
)


@given(SCHEDULES, st.data())
def test_cosine_is_the_formula(drawn: tuple[int, int, int, int], data: Any) -> None:
    low, high, cycles, steps = drawn
    step = data.draw(st.integers(0, steps - 1))
    period = steps / cycles
    exact = low + 0.5 * (high - low) * (1 - math.cos(math.pi * math.fmod(step, period) / period))
    bits = scheduled_bits(step, steps, minimum=low, maximum=high, cycles=cycles)
    in_floats_a_step_may_fall_into_the_cycle_before = math.isclose(math.fmod(step, period), period, rel_tol=1e-9)
    assert abs(bits - exact) <= 0.5 + 1e-9 or in_floats_a_step_may_fall_into_the_cycle_before


@given(SCHEDULES, st.sampled_from(["cosine", "linear", "triangular", "constant"]))
def test_every_schedule(drawn: tuple[int, int, int, int], schedule: Any) -> None:
    low, high, cycles, steps = drawn
    widths = [
        scheduled_bits(step, steps, minimum=low, maximum=high, cycles=cycles, schedule=schedule)
        for step in range(steps)
    ]
    if schedule == "constant":
        assert set(widths) == {high}
        return
    assert low <= min(widths)
    assert max(widths) <= high
    assert widths[0] == low, "a cycle begins at the minimum"
    if steps % cycles == 0:
        period = steps // cycles
        assert widths == widths[:period] * cycles
        if schedule == "triangular":
            assert widths[1:period] == widths[1:period][::-1]
        else:
            assert widths[:period] == sorted(widths[:period])


def test_schedules_by_hand() -> None:
    widths = {
        schedule: [
            scheduled_bits(step, 16, minimum=3, maximum=8, cycles=2, schedule=schedule)  # type: ignore[arg-type]
            for step in range(8)
        ]
        for schedule in ("cosine", "linear", "triangular")
    }
    assert widths == {
        "cosine": [3, 3, 4, 5, 6, 6, 7, 8],
        "linear": [3, 4, 4, 5, 6, 6, 7, 7],
        "triangular": [3, 4, 6, 7, 8, 7, 6, 4],
    }


def flat(model: Any) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def _by_hand(model: Any, widths: list[int], rows: list[torch.Tensor], rate: float, accumulate: int) -> None:
    """SGD at those widths, without a Trainer."""
    layers = FakeQuantization(model)
    batches = iter(rows)
    for bits in widths:
        layers.bits = bits
        model.zero_grad()
        for _ in range(accumulate):
            batch = next(batches)
            (model(batch, labels=labels_of(batch)).loss / accumulate).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    layers.remove()


class Rows(TrainerCallback):
    """What the model is given, in its order."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[torch.Tensor] = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.rows.append(kwargs["input_ids"]), with_kwargs=True
        )


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_at_the_scheduled_widths(make: Any, accumulate: int, tmp_path: Path) -> None:
    model, twin, unlike = make(), make(), make()
    seen = Rows(model)
    trainer = train(
        model,
        tmp_path,
        CyclicPrecisionCallback(2, 6, cycles=2),
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=2,
    )
    widths = [scheduled_bits(step, 8, minimum=2, maximum=6, cycles=2) for step in range(8)]
    assert widths == [2, 3, 4, 5] * 2
    assert logged_bits(trainer) == widths
    assert len(seen.rows) == 8 * accumulate
    _by_hand(twin, widths, seen.rows, 0.5, accumulate)
    _by_hand(unlike, widths[::-1], seen.rows, 0.5, accumulate)
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=name)
    distances = [math.dist(flat(model), flat(each)) for each in (twin, unlike)]
    assert distances[0] < distances[1] / 100


class Watch(TrainerCallback):
    """What the model computes when the Trainer evaluates, and what it saves."""

    def __init__(self, model: Any) -> None:
        self.model, self.expected, self.computed = model, [], []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.computed.append(metrics["eval_loss"])
        twin = type(self.model)(self.model.config)
        twin.load_state_dict(self.model.state_dict())
        FakeQuantization(twin.eval(), bits=4)
        rows = Tokens(8).rows
        with torch.no_grad():
            self.expected.append(float(twin(rows, labels=labels_of(rows)).loss))


def test_evaluation_and_checkpoints_between_steps(tmp_path: Path) -> None:
    model = gpt2()
    watch = Watch(model)
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4),
        train_dataset=Tokens(32),
        eval_dataset=Tokens(8),
        callbacks=[CyclicPrecisionCallback(3, 8, cycles=2, evaluation_bits=4), watch],
    )
    trainer.train()
    assert watch.computed == pytest.approx(watch.expected, rel=1e-5)
    assert len(watch.computed) == 2
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-8")
    for (name, weight), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_resumed_it_goes_on_in_the_cycle(tmp_path: Path) -> None:
    train(gpt2(), tmp_path, CyclicPrecisionCallback(3, 8, cycles=1), save_strategy="steps", save_steps=5)
    callback = CyclicPrecisionCallback(3, 8, cycles=1)
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=Tokens(32), callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged_bits(trainer) == [scheduled_bits(step, 8, minimum=3, maximum=8, cycles=1) for step in range(8)]


class Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is full")


def test_after_an_error_remove_makes_it_plain(tmp_path: Path) -> None:
    model, callback = gpt2(), CyclicPrecisionCallback()
    with pytest.raises(RuntimeError, match="disk"):
        train(model, tmp_path, callback, Fails())
    assert any("forward" in vars(module) for module in model.modules())
    callback.remove()
    callback.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    twin = gpt2()
    twin.load_state_dict(model.state_dict())
    rows = Tokens(2).rows
    assert torch.equal(model.eval()(rows).logits, twin.eval()(rows).logits)


def test_what_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"minimum": 1}, "the minimum has 1 bits"),
        ({"maximum": 16}, "the maximum has 16 bits"),
        ({"minimum": 8, "maximum": 3}, "a minimum of 8 bits and a maximum of 3"),
        ({"cycles": 0}, "0 cycles: needs a whole number"),
        ({"schedule": "sawtooth"}, "there is no schedule 'sawtooth'; there are cosine, linear"),
        ({"backward_bits": 1}, "the backward pass has 1 bits"),
        ({"evaluation_bits": 1}, "evaluation has 1 bits"),
    ):
        with pytest.raises(PrecisionError, match=message):
            CyclicPrecisionCallback(**options)
    with pytest.raises(PrecisionError, match="9 cycles, step 0 of 8: a cycle needs a step or more"):
        train(gpt2(), tmp_path, CyclicPrecisionCallback(cycles=9))
    with pytest.raises(PrecisionError, match="pattern 'gate' matches no linear layer"):
        train(gpt2(), tmp_path, CyclicPrecisionCallback(modules=["gate"]))
    with pytest.raises(PrecisionError, match="step 8 of 8"):
        scheduled_bits(8, 8, minimum=3, maximum=8, cycles=1)
