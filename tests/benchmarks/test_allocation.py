"""The benchmark of allocated widths runs on tiny models, and its rows say what they claim."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import allocation
import pytest
import torch
from allocation import SUBJECTS, Subject
from hand_made_maps import hand_made_maps
from tiny_gpt2 import _tokenizer
from tiny_models import save_tokenizer, tiny_model
from transformers import AutoTokenizer

from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.perplexity import kl_divergence
from optimum_qguard.precision.decoding import decoded


def words(start: int) -> Any:
    return lambda tokens: " ".join(f"w{start + index * 7 % 500}" for index in range(tokens))


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    monkeypatch.setenv("OPTIMUM_QGUARD_CACHE", str(tmp_path / "cache"))
    made = Subject(lambda: tmp_path / "model", words(0), words(3), (48, 64))
    monkeypatch.setattr(allocation, "SUBJECTS", {"tiny": made})
    return made


def test_rows(subject: Subject, tmp_path: Path) -> None:
    output = tmp_path / "allocation.json"
    output.write_text('{"rows": [{"model": "another"}, {"model": "tiny"}]}')
    allocation.measure(Namespace(models=["tiny"], device="cpu", output=output, resume=True))
    another, *rows = json.loads(output.read_text())["rows"]
    assert another == {"model": "another"}, "rows of models that were not asked for are kept"
    assert len(rows) == 14
    for row in rows:
        assert row["allocated bits"] <= row["bits"] + 1e-9
        assert row["allocated predicted KL"] <= row["predicted KL"] * (1 + 1e-6)
    by_map = {row["map"]: row for row in rows}
    assert by_map["C1 all8"]["allocated KL"] == by_map["C1 all8"]["KL"]
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    reference = tiny_model("llama")
    reference.lm_head.weight.data.mul_(10)
    with decoded(model, hand_made_maps(model)["C7 qkv4 proj8"].resolve(model)):
        kl = kl_divergence(reference, model, tokenizer, words(3)(64), window=256, stride=128, max_tokens=64)
    assert by_map["C7 qkv4 proj8"]["KL"] == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(("name", "blocks"), [("gpt2", "transformer.h"), ("llama", "model.layers")])
def test_hand_made_maps(name: str, blocks: str) -> None:
    """The paper's average bits, over GPT-2's modules."""
    model = tiny_model(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 12})
    maps = hand_made_maps(model)
    assert len(maps) == 10
    widths = {title: bitmap.resolve(model) for title, bitmap in maps.items()}
    for each in widths.values():
        assert set(each.values()) <= {4, 8}
    if name == "gpt2":
        averages = {title.split()[0]: sum(each.values()) / len(each) for title, each in widths.items()}
        thirds = dict.fromkeys(("C3", "C4", "C5"), 16 / 3)
        assert averages == pytest.approx(
            {"C1": 8, "C2": 4, **thirds, "C6": 5, "C7": 5, "C8": 5, "C9": 4, "C10": 14 / 3}
        )
    for title, wide in (("C3", (0, 1, 2, 3)), ("C4", (8, 9, 10, 11)), ("C5", (0, 1, 10, 11))):
        (found,) = (each for key, each in widths.items() if key.startswith(title))
        for layer, bits in found.items():
            assert (bits == 8) is any(f"{blocks}.{index}." in layer for index in wide)


@pytest.mark.parametrize("name", SUBJECTS)
def test_texts_are_two_and_long_enough(name: str) -> None:
    subject = SUBJECTS[name]
    texts = [text(n) for text, n in zip((subject.measured, subject.held_out), subject.tokens, strict=True)]
    tokenize = _tokenizer() if name == "GPT-2" else AutoTokenizer.from_pretrained(smollm2_path())
    assert all(len(tokenize(text).input_ids) >= n for text, n in zip(texts, subject.tokens, strict=True))
    assert texts[0] != texts[1]
