import re
from typing import Any

import pytest

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generated_squad import generated_passages


def _names(split: Any) -> set[str]:
    passages = generated_passages(3000, seed=3, split=split)
    return {answer for passage in passages for answer in passage.answers if not re.search(r"\d", answer)}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_answer_stands_in_the_context_and_not_in_the_question(split: Any) -> None:
    for passage in generated_passages(500, seed=1, split=split):
        (answer,) = passage.answers
        assert answer in passage.context
        assert answer not in passage.question
        assert passage.context.endswith(".")


def test_a_question_names_someone_or_something_of_the_context() -> None:
    for passage in generated_passages(200, seed=1, split="train"):
        named = re.findall(r"(?:[A-Z]\w+ )*[A-Z0-9]\w+", passage.question.partition(" ")[2])
        assert any(name in passage.context for name in named), passage


def test_the_splits_share_no_name() -> None:
    train, validation = _names("train"), _names("validation")
    assert len(train) > 1000
    assert len(validation) > 300
    assert not train & validation


def test_a_seed_is_its_questions() -> None:
    first = generated_passages(50, seed=1, split="train")
    assert first == generated_passages(50, seed=1, split="train")
    assert first[:20] == generated_passages(20, seed=1, split="train")
    assert not set(first) & set(generated_passages(50, seed=2, split="train"))
    assert len({passage.context for passage in first}) == 50


def test_as_many_facts_as_asked_for() -> None:
    for passage in generated_passages(50, seed=1, split="train", facts=(5, 6)):
        assert passage.context.count(".") in (5, 6)


def test_bad_input() -> None:
    with pytest.raises(EvaluationError, match="0 questions about 2 to 4 facts: needs at least one of each"):
        generated_passages(0, seed=1, split="train")
    with pytest.raises(EvaluationError, match="about 3 to 2 facts"):
        generated_passages(1, seed=1, split="train", facts=(3, 2))
    with pytest.raises(EvaluationError, match="there is no split 'test'; there are train and validation"):
        generated_passages(1, seed=1, split="test")  # type: ignore[arg-type]
