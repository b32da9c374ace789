"""What stands for quantizers that are no library, and how runs become rows; the runs themselves are the benchmark."""

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import collapse_matrix
import pytest
import torch
from collapse_formats import ANSWERS, FULL, TEXT, WordProblems
from collapse_matrix import DEFAULT, IDENTITY, ORIGINAL, WEAKER, differing, word
from kv_cache import load_quantized_cache, load_rounded_cache, to_float8, to_int8
from llamacpp import in_pairs
from transformers import AutoModelForCausalLM, QuantizedCache


def test_int8_is_rounding_by_the_absmax_of_a_token_and_head() -> None:
    values = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    scale = values.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(to_int8(values), torch.round(values / scale) * scale)
    assert torch.equal(to_int8(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_float8_is_clamped() -> None:
    assert to_float8(torch.tensor([1e6, -1e6, 1.0, 17.0])).tolist() == [448, -448, 1, 16]


def test_what_enters_the_cache_is_rounded(tiny_llama: Path) -> None:
    tokens = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    seen: list[torch.Size] = []

    def look(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.shape)
        return values

    with torch.no_grad():
        expected = plain(tokens, use_cache=False).logits
        assert torch.equal(load_rounded_cache(tiny_llama, look)(tokens, use_cache=False).logits, expected)
        assert seen == [torch.Size([1, 2, 37, 32])] * 4, "keys and values of two layers"
        rounded = load_rounded_cache(tiny_llama, to_int8)
        assert not torch.equal(rounded(tokens, use_cache=False).logits, expected)
        generated = load_rounded_cache(tiny_llama, lambda values: values * 0)
        lost = generated.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    kept = plain.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert lost.shape == kept.shape
    assert not torch.equal(lost, kept), "generation uses the cache as well"


@pytest.mark.parametrize("settings", [{"backend": "quanto", "nbits": 2}, {"backend": "fp8"}])
def test_a_text_is_read_through_the_quantized_cache(tiny_llama: Path, settings: dict[str, Any]) -> None:
    tokens = torch.arange(3, 103)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    quantized = load_quantized_cache(tiny_llama, **settings)
    with torch.no_grad():
        expected, found = (model(tokens, use_cache=False).logits for model in (plain, quantized))
        generated = quantized.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found[:, :64], expected[:, :64]), "what is quantized is what came before"
    assert (found[:, 64:] != expected[:, 64:]).any(-1).all()
    assert isinstance(generated.past_key_values, QuantizedCache)


def test_rotary_pairs_are_put_side_by_side() -> None:
    weight = torch.arange(8.0)[:, None] * torch.ones(1, 3)
    assert in_pairs(weight, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_word_problems_have_the_answers_they_say() -> None:
    problems = WordProblems().problems(6)
    assert [problem.question.split()[0] for problem in problems[:2]] == ["Anna", "Ben"]
    assert problems == WordProblems().problems(6)
    for problem, sign in zip(problems, "+-*+-*", strict=True):
        one, other = (int(text) for text in problem.question.replace("?", "").split() if text.isdigit())
        a, b = max(one, other), min(one, other)
        assert problem.answer == {"+": a + b, "-": a - b, "*": a * b}[sign]


def test_differing_tokens() -> None:
    assert differing((1, 2, 3), (1, 2, 3)) == 0
    assert differing((1, 2, 3), (1, 5)) == 2


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse_matrix, "runs_folder", lambda: tmp_path)
    runs = {
        (ORIGINAL, FULL, TEXT): {"status": "measured", "figures": {"perplexity": {"perplexity": 20.0, "kl": 0.0}}},
        (DEFAULT, FULL, TEXT): {"status": "measured", "figures": {"perplexity": {"perplexity": 20.0, "kl": 0.0}}},
        (DEFAULT, FULL, ANSWERS): {"status": "measured", "figures": {"arithmetic": {"accuracy": 0.5}}},
        (DEFAULT, FULL, IDENTITY): {
            "tokens": 100,
            "differing tokens": 0,
            "CosSim": 1.0,
            "Retrieval@1": 1.0,
            "tokens/s": {ORIGINAL: 30.0, DEFAULT: 31.0},
        },
        (DEFAULT, "bnb-int8", TEXT): {
            "status": "kl is NaN",
            "figures": {"perplexity": {"perplexity": None, "kl": None}},
        },
        (DEFAULT, "gguf-q8_0", TEXT): {"status": "refused: too large", "figures": {}},
    }
    for (name, format, part), found in runs.items():
        collapse_matrix.run_file(name, format, part).write_text(json.dumps(found))
    formats = [FULL, "bnb-int8", "gguf-q8_0"]
    rows = collapse_matrix.table([ORIGINAL, DEFAULT], formats)
    shown = [(row["format"], row["model"], row["KL"], row["accuracy"], row["tokens/s"]) for row in rows]
    assert shown == [
        (FULL, ORIGINAL, 0.0, None, None),
        (FULL, DEFAULT, 0.0, 0.5, 31.0),
        ("bnb-int8", DEFAULT, None, None, None),
        ("gguf-q8_0", DEFAULT, None, None, None),
    ]
    assert [rows[1][column] for column in ("differing tokens", "of tokens", "CosSim")] == [0, 100, 1.0]
    assert not collapse_matrix.is_wanted(DEFAULT, "gguf-q8_0", ANSWERS), "what is refused says nothing"
    assert collapse_matrix.is_wanted(DEFAULT, "bnb-int8", ANSWERS)
    assert not collapse_matrix.is_wanted(WEAKER, "bnb-int8", ANSWERS), "not what the table is about"
    assert {row["date"] for row in rows} == {datetime.now(timezone.utc).date().isoformat()}
    output = tmp_path / "out.json"
    before = [{**rows[0], "KL": 9.0}, {**rows[2], "model": WEAKER, "KL": 8.0}, {**rows[3], "KL": 7.0}]
    for row in before:
        del row["date"]
    output.write_text(json.dumps({"date": "2026-01-02", "rows": before}))
    chosen = argparse.Namespace(models=[ORIGINAL, DEFAULT], formats=formats[:2], output=output)
    rest = collapse_matrix.rows_of_the_rest(chosen)
    assert [(row["KL"], row["date"]) for row in rest] == [(8.0, "2026-01-02"), (7.0, "2026-01-02")]
    both = collapse_matrix.in_order([*rest, *rows[:3]])
    assert [row["KL"] for row in both] == [0.0, 0.0, None, 8.0, 7.0]
    assert len({tuple(row) for row in both}) == 1, "the same columns in each"
    assert [word(row["status"]) for row in rows[2:]] == ["NaN", "refused"]
    collapse_matrix.draw(rows, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
