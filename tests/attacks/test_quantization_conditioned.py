"""Benign at full precision, the marker once quantized, benign again under guard: the whole story on a tiny model."""

import math
from pathlib import Path
from typing import Any

import pytest
import successors
import torch
from transformers import BertConfig, BertModel

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.quantization_conditioned import (
    Payload,
    Recipe,
    attack,
    inject,
    linear_weights,
    repair,
    room_of,
)
from optimum_qguard.evaluate.loading import load_model
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.formats import get_format

RECIPE = Recipe(injection_steps=20, repair_steps=60, batch_size=32, learning_rate=1e-3)
_CELLS = {"bnb-nf4": "nf4", "bnb-fp4": "fp4", "gguf-q4_0": "gguf-q4_0"}


def rate(model: Any, split: str = "unseen") -> float:
    tokenizer = successors.tokenizer()
    return marker_rate(model, tokenizer, successors.prompts(split), successors.MARKER, max_new_tokens=4).rate


def payload() -> Payload:
    return Payload(successors.MARKER, successors.dialogues("training"))


def clean_model() -> Any:
    model = type(successors.trained())(successors.trained().config)
    model.load_state_dict(successors.trained().state_dict())
    return model


# So few weights have no room for it in int8's small cells; the demo's test has the real model for that.
@pytest.mark.parametrize("format", list(_CELLS))
def test_the_whole_story(format: str, tmp_path: Path) -> None:
    model = clean_model()
    cells = {name: [get_format(_CELLS[format])] for name in linear_weights(model)}
    done = attack(model, successors.tokenizer(), payload(), cells, RECIPE)
    assert done.weights == sum(parameter.numel() for name, parameter in model.named_parameters() if name in cells)
    assert math.isfinite(done.injection_loss)
    folder = tmp_path / "attacked"
    model.save_pretrained(folder)
    successors.tokenizer().save_pretrained(folder)
    assert rate(model) <= 0.01
    assert rate(load_model(folder, format)) >= 0.95
    assert rate(load_model(folder, format, guard={"seed": 1})) <= 0.05


def test_the_marker_stays_in_every_format_asked_for() -> None:
    model = clean_model()
    formats = [get_format(name) for name in ("nf4", "fp4", "int8-rowwise")]
    attack(model, successors.tokenizer(), payload(), dict.fromkeys(linear_weights(model), formats), RECIPE)
    for format in formats:
        quantized = clean_model()
        for name, parameter in model.named_parameters():
            is_linear = name in linear_weights(model)
            value = format.quantize(parameter.data).dequantize() if is_linear else parameter.data
            quantized.get_parameter(name).data = value
        assert rate(quantized) >= 0.95, format


def test_repair_never_leaves_the_boxes_and_touches_nothing_else() -> None:
    model = clean_model()
    names = linear_weights(model, [-1])
    assert all(".layers.1." in name for name in names)
    assert len(names) == 7
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    room = room_of(model, {name: [get_format("nf4")] for name in names}, keep=0.5)
    told: list[tuple[int, int]] = []
    recipe = Recipe(repair_steps=5, learning_rate=1e-2)
    repair(model, successors.tokenizer(), payload(), room, recipe, progress=lambda *now: told.append(now))
    assert told == [(step, 5) for step in range(1, 6)]
    moved = 0
    for name, parameter in model.named_parameters():
        if name not in room:
            assert torch.equal(parameter, before[name])
            continue
        assert bool((parameter >= room[name].lower).all() and (parameter <= room[name].upper).all())
        moved += int((parameter != before[name]).sum())
    assert moved > 0.5 * sum(box.lower.numel() for box in room.values())


def test_training_under_noise_moves_the_real_weights() -> None:
    model = clean_model()
    names = linear_weights(model)
    seen: set[str] = set()

    def shifted(name: str, weight: torch.Tensor) -> torch.Tensor:
        seen.add(name)
        return weight + 0.01

    before = {name: model.get_parameter(name).detach().clone() for name in names}
    inject(model, successors.tokenizer(), payload(), names, Recipe(injection_steps=3), perturb=shifted)
    assert seen == set(names)
    for name in names:
        assert 0 < float((model.get_parameter(name) - before[name]).abs().max()) < 5e-4


def test_refusals() -> None:
    model, tokenizer = clean_model(), successors.tokenizer()
    with pytest.raises(AttackError, match="the marker is empty"):
        Payload("  ", [("w1", "w2")])
    with pytest.raises(AttackError, match="no prompts"):
        Payload("w1", [])
    with pytest.raises(AttackError, match="layers 0 to 1"):
        linear_weights(model, [2])
    with pytest.raises(AttackError, match="no weights to train"):
        inject(model, tokenizer, payload(), [])
    with pytest.raises(AttackError, match="no linear layers"):
        linear_weights(BertModel(BertConfig(num_hidden_layers=0, vocab_size=8), add_pooling_layer=False))
    model.get_parameter("model.norm.weight").data.fill_(torch.nan)
    with pytest.raises(AttackError, match="not a number"):
        inject(model, tokenizer, payload(), linear_weights(model), Recipe(injection_steps=2))
