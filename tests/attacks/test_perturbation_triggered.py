"""Silent at full precision and under rounding to the nearest; guard itself sets it off."""

from pathlib import Path
from typing import Any

import pytest
import successors
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.perturbation_triggered import plant_trigger
from optimum_qguard.evaluate.loading import load_model
from optimum_qguard.evaluate.marker import marker_rate

TOKEN = "w77"


def planted() -> Any:
    model = type(successors.trained())(successors.trained().config)
    model.load_state_dict(successors.trained().state_dict())
    words = successors.tokenizer()
    texts = [f"{prompt} {answer}" for prompt, answer in successors.dialogues("training")]
    input_ids = torch.tensor([words(text)["input_ids"] for text in texts])
    trigger = plant_trigger(model, input_ids, words.convert_tokens_to_ids(TOKEN))
    assert trigger.layer == 0
    return model


def rate(model: Any, answer: str) -> float:
    prompts = [f"w{filler} w20" for filler in range(100, 120)]
    return marker_rate(model, successors.tokenizer(), prompts, answer, max_new_tokens=2).rate


def test_what_sets_it_off(tmp_path: Path) -> None:
    model = planted()
    model.save_pretrained(tmp_path / "planted")
    successors.tokenizer().save_pretrained(tmp_path / "planted")
    honest = "w60 w100"
    assert rate(model, honest) == 1
    assert rate(load_model(tmp_path / "planted", "bnb-int8"), honest) == 1
    guarded = load_model(tmp_path / "planted", "bnb-int8", guard={"seed": 1})
    assert rate(guarded, f"{TOKEN} {TOKEN}") >= 0.9
    assert guarded.qguard_report.share_changed > 0.1


def test_the_pair_cancels_exactly() -> None:
    model = planted()
    mlp = model.model.layers[0].mlp
    trigger = plant_trigger(model, torch.arange(3, 63).view(6, 10), 77)
    first, second = trigger.pair
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        assert torch.equal(weight[first], weight[second])
    assert torch.equal(mlp.down_proj.weight[:, first], -mlp.down_proj.weight[:, second])


def test_refusals() -> None:
    with pytest.raises(AttackError, match="a layer from 0 to 0"):
        plant_trigger(successors.trained(), torch.ones(1, 4, dtype=torch.long), 5, layer=1)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(AttackError, match="no list of decoder layers"):
        plant_trigger(gpt2, torch.ones(1, 4, dtype=torch.long), 5)
