from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.squad import load_squad, squad, squad_score

ROWS = [
    {
        "id": "1",
        "title": "Tea",
        "context": "Tea came to Japan in the ninth century.",
        "question": "When did tea come to Japan?",
        "answers": {"text": ["the ninth century", "ninth century"], "answer_start": [21, 25]},
    },
    {
        "id": "2",
        "title": "Tea",
        "context": "Green tea is not fermented.",
        "question": "Which tea is red?",
        "answers": {"text": [], "answer_start": []},
    },
    {
        "id": "3",
        "title": "Tea",
        "context": "Green tea is not fermented.",
        "question": "Which tea is not fermented?",
        "answers": {"text": ["Green tea"], "answer_start": [0]},
    },
]


@pytest.mark.parametrize(
    ("text", "answers", "f1", "exact_match"),
    [
        ("Green tea", ["Green tea"], 1, 1),
        ("The green tea!", ["green tea"], 1, 1),
        ("black tea", ["green tea"], 1 / 2, 0),
        ("the cup of green tea", ["green tea"], 2 * (2 / 4) * 1 / (2 / 4 + 1), 0),
        ("tea", ["coffee", "black tea", "tea"], 1, 1),
        ("", ["tea"], 0, 0),
        ("milk", ["tea"], 0, 0),
    ],
)
def test_f1_and_exact_match_by_hand(text: str, answers: list[str], f1: float, exact_match: float) -> None:
    score = squad_score([text], [answers])
    assert score.f1 == pytest.approx(f1)
    assert (score.exact_match, score.n) == (exact_match, 1)


def test_score_is_the_mean_over_questions() -> None:
    score = squad_score(["tea", "black tea", "milk"], [["tea"], ["green tea"], ["tea"]])
    assert score.f1 == pytest.approx(0.5)
    assert score.exact_match == pytest.approx(1 / 3)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_questions_of_a_data_set(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"squad.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    first, last = load_squad(path)
    assert first.answers == ("the ninth century", "ninth century")
    assert last.prompt.startswith("Green tea is not fermented.")
    assert last.question in last.prompt
    assert len(load_squad(path, limit=1)) == 1


def test_a_models_answers(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(ROWS))
    passages = load_squad(path)
    prompts = [passage.prompt for passage in passages]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=16)
    texts = [answer.text.strip().partition("\n")[0] for answer in answers]
    right = [replace(passages[0], answers=(texts[0],)), passages[1]]
    found = squad(model, tokenizer, right, max_new_tokens=16)
    assert found == squad_score(texts, [passage.answers for passage in right])
    assert found.exact_match == 0.5


def test_bad_input(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    bad: list[tuple[list[str], list[list[str]]]] = [([], []), (["a"], []), (["a"], [[]])]
    for texts, answers in bad:
        with pytest.raises(EvaluationError, match="each needs a text and a right answer"):
            squad_score(texts, answers)
    path = tmp_path / "squad.json"
    rows: list[tuple[list[dict[str, Any]], str]] = [
        ([{"text": "no columns of SQuAD's"}], "has the columns text; SQuAD's are needed"),
        (ROWS[1:2], "no question has an answer"),
        ([{**ROWS[0], "answers": ["the ninth century"]}], r"answers are \['the ninth century'\]; SQuAD's are \{'text'"),
    ]
    for content, message in rows:
        path.write_text(json.dumps(content))
        with pytest.raises(EvaluationError, match=message):
            load_squad(path)
    with pytest.raises(EvaluationError, match="no prompts"):
        squad(model, tokenizer, [])
