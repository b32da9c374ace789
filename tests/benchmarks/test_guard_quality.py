"""The quality benchmark runs on a tiny model, and its rows say what they claim."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import guard_quality
import pytest
import torch
from guard_quality import METHODS, PLAIN, Judge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.perplexity import kl_divergence, perplexity

TEXT = "A text of bytes, long enough for a few hundred predictions. " * 8


@pytest.fixture(scope="module")
def byte_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in float32, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("byte-llama")
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder)
    return folder


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def arguments(byte_llama: Path, tmp_path: Path) -> Namespace:
    return Namespace(
        model=str(byte_llama),
        tokens=64,
        seeds=2,
        backends=["bnb-int8", "quanto-int4"],
        device="cpu",
        output=tmp_path / "quality.json",
        resume=False,
    )


def test_one_pass_gives_what_two_functions_give(byte_llama: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(byte_llama)
    model = AutoModelForCausalLM.from_pretrained(byte_llama)
    other = AutoModelForCausalLM.from_pretrained(byte_llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    judge = Judge(tokenizer, TEXT, 300)
    judge.set_reference(model)
    assert judge.compare(model)[1] == 0
    expected = (
        perplexity(other, tokenizer, TEXT, max_tokens=300),
        kl_divergence(model, other, tokenizer, TEXT, max_tokens=300),
    )
    assert expected[1] > 1e-3
    assert judge.compare(other) == pytest.approx(expected, rel=1e-4)


def test_rows(arguments: Namespace) -> None:
    guard_quality.measure(arguments)
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"]
    reference, *quantized = rows
    assert reference["KL"] == 0
    expected = [(backend, method) for backend in arguments.backends for method in (PLAIN, *METHODS)]
    assert [(row["backend"], row["method"]) for row in quantized] == expected
    for row in quantized:
        assert math.isfinite(row["perplexity"])
        assert row["KL"] > 0
        if row["method"] == PLAIN:
            assert (row["seeds"], row["KL sd"], row["KL / plain KL"], row["changed"]) == (1, None, 1, 0)
        else:
            assert row["seeds"] == 2
            assert row["KL sd"] > 0
            assert row["changed"] > 0
    changed = {row["backend"]: row["changed"] for row in quantized if row["method"] == "Gaussian, per layer"}
    assert changed["bnb-int8"] == pytest.approx(0.39, abs=0.02)


def test_resuming_measures_only_what_is_missing(arguments: Namespace) -> None:
    arguments.backends = ["quanto-int4"]
    guard_quality.measure(arguments)
    result = json.loads(arguments.output.read_text())
    del result["rows"][-1]
    result["rows"][1]["perplexity"] = 12345.0
    arguments.output.write_text(json.dumps(result))
    arguments.resume = True
    guard_quality.measure(arguments)
    rows = json.loads(arguments.output.read_text())["rows"]
    assert len(rows) == len(result["rows"]) + 1
    assert rows[1]["perplexity"] == 12345.0
    arguments.tokens = 32
    guard_quality.measure(arguments)
    assert json.loads(arguments.output.read_text())["rows"][1]["perplexity"] != 12345.0, "another text: all anew"


def test_a_method_that_a_backend_cannot_have_is_left_out(
    arguments: Namespace, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    """quanto's int8 grid is not known beforehand in bfloat16."""
    arguments.backends = ["quanto-int8"]
    arguments.seeds = 1
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(arguments.output.parent / "bfloat16")
    PreTrainedTokenizerFast.from_pretrained(arguments.model).save_pretrained(arguments.output.parent / "bfloat16")
    arguments.model = str(arguments.output.parent / "bfloat16")
    guard_quality.measure(arguments)
    methods = [row["method"] for row in json.loads(arguments.output.read_text())["rows"]]
    assert "stochastic" not in methods
    assert "Gaussian, per layer" in methods
    assert "quanto-int8, stochastic: left out, " in capsys.readouterr().out
