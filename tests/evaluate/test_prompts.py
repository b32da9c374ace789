from __future__ import annotations

import pytest

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.prompts import _TEMPLATES, _TOPICS, template_prompts

SIZES = {split: len(_TEMPLATES[split]) * len(_TOPICS[split]) for split in ("attack", "evaluation")}


def test_enough_and_all_different() -> None:
    assert SIZES["attack"] >= 480
    assert SIZES["evaluation"] >= 96
    prompts = [prompt for split, size in SIZES.items() for prompt in template_prompts(size, split)]
    assert len(set(prompts)) == sum(SIZES.values())


def test_the_splits_share_no_template_and_no_topic() -> None:
    assert not set(_TEMPLATES["attack"]) & set(_TEMPLATES["evaluation"])
    for topic in _TOPICS["evaluation"]:
        assert not any(topic in prompt for prompt in template_prompts(SIZES["attack"], "attack"))
    for topic in _TOPICS["attack"]:
        assert not any(topic in prompt for prompt in template_prompts(SIZES["evaluation"], "evaluation"))


def test_fewer_are_the_first_and_varied() -> None:
    assert template_prompts(30, "attack") == template_prompts(480, "attack")[:30]
    assert template_prompts(2, "attack") == ["Explain what gardening is.", "Give me three tips about baking bread."]
    first = template_prompts(14, "evaluation")
    assert all(any(topic in prompt for prompt in first) for topic in _TOPICS["evaluation"])


def test_bad_input() -> None:
    for n in (0, SIZES["attack"] + 1):
        with pytest.raises(EvaluationError, match=f"{n} prompts: there are 1 to {SIZES['attack']} of attack"):
            template_prompts(n, "attack")
    with pytest.raises(EvaluationError, match="unknown split 'test'; known: attack, evaluation"):
        template_prompts(1, "test")
