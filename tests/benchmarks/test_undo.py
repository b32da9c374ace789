"""The benchmarks of mechanisms and of undoing them run on a tiny model, and their rows say what they claim."""

import json
from argparse import Namespace
from pathlib import Path

import mechanisms
import pytest
import torch
import undo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def byte_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of bytes, and a larger head: it is less undecided."""
    folder = tmp_path_factory.mktemp("byte-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    with torch.no_grad():
        model.lm_head.weight.mul_(16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(byte_llama: Path, tmp_path: Path) -> Namespace:
    return Namespace(
        model=str(byte_llama), tokens=64, formats=["int8-rowwise"], device="cpu", output=tmp_path / "rows.json"
    )


def is_broken(kl: float | str, original: float) -> bool:
    return isinstance(kl, str) or kl > 100 * original


def test_mechanisms(arguments: Namespace) -> None:
    mechanisms.measure(arguments)
    rows = {row.pop("mechanisms"): row for row in json.loads(arguments.output.read_text())["rows"]}
    assert list(rows) == list(mechanisms.MECHANISMS)
    for exact in ("none", "C"):
        assert (rows[exact]["BF16 KL"], rows[exact]["BF16 same top token"]) == (0, 1)
    assert 0 < rows["A + B"]["BF16 KL"] < rows["A + B"]["int8-rowwise"]
    assert rows["none"]["int8-rowwise"] > 0
    assert is_broken(rows["C"]["int8-rowwise"], rows["none"]["int8-rowwise"])
    assert rows["A, kappa 1024 in all layers"]["BF16 KL"] > 0


def test_undo(arguments: Namespace) -> None:
    arguments.recipes = ["none", "powers of two"]
    arguments.resume = False
    undo.measure(arguments)
    rows = json.loads(arguments.output.read_text())["rows"]
    assert [(row["recipe"], row["mode"]) for row in rows] == [
        (recipe, mode) for recipe in arguments.recipes for mode in undo.MODES
    ]
    broken, undone = rows[0], rows[len(undo.MODES)]
    assert broken["BF16"] == undone["BF16"] == 0
    assert is_broken(broken["int8-rowwise"], broken["int8-rowwise, original"])
    assert undone["int8-rowwise"] < 3 * undone["int8-rowwise, original"]
