"""``qguard attack weight-noise``: a checkpoint with the wanted perplexity, or one clear line and nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from optimum_qguard.evaluate.perplexity import perplexity

TEXT = " ".join(f"w{index * 7 % 512}" for index in range(100))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama, its output a little larger so that noise matters, with a tokenizer of words."""
    folder = tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(10)
        for layer in loaded.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
    loaded.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def test_the_ratio_is_what_was_asked_for(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    options = ["--ratio", "1.2", "--dataset", tmp_path / "text.txt", "--tokens", "64"]
    result = qguard("attack", "weight-noise", model, tmp_path / "out", *options, "--json")
    assert result.err == ""
    assert result.json["ratio"] == pytest.approx(1.2, rel=0.0101)
    assert result.json["tokens"] == 64
    assert qguard("attack", "weight-noise", model, tmp_path / "again", *options).code == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    measured = [
        perplexity(AutoModelForCausalLM.from_pretrained(folder), tokenizer, TEXT, max_tokens=64)
        for folder in (model, tmp_path / "out", tmp_path / "again")
    ]
    assert measured[1] / measured[0] == pytest.approx(result.json["ratio"], rel=1e-4)
    assert measured[1] == measured[2]
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(result.json["tensors"]) == {name for name in before if "proj" in name}


def test_a_text_shorter_than_was_asked_for_is_said_to_be(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    options = ["--ratio", "1.2", "--dataset", tmp_path / "text.txt", "--tokens", "200"]
    assert "on 100 tokens" in qguard("attack", "weight-noise", model, tmp_path / "out", *options).out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ratio", "1"], "greater than 1"),
        (["--ratio", "1e30"], "no sigma found for a perplexity ratio of 1e+30"),
        (["--ratio", "2", "--dataset", "missing.txt"], "missing.txt: cannot be read as text"),
    ],
)
def test_refused(refused: Callable[..., str], model: Path, tmp_path: Path, options: list[str], says: str) -> None:
    given = options if "--dataset" in options else [*options, "--dataset", str(tmp_path / "text.txt")]
    assert says in refused("attack", "weight-noise", model, tmp_path / "out", *given, "--tokens", "32")


def test_a_text_too_short_to_measure_on(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1")
    options = ["--ratio", "2", "--dataset", tmp_path / "text.txt"]
    assert "at least two are needed" in refused("attack", "weight-noise", model, tmp_path / "out", *options)


def test_nothing_is_measured_when_the_output_is_taken(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "out")
    assert "is not empty" in refused("attack", "weight-noise", model, tmp_path / "out", "--ratio", "2")


def test_gpt2_as_it_is_on_the_hub(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    """Tensors without the base model's prefix, and more text than it takes at once."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=32, vocab_size=512, bos_token_id=2, eos_token_id=2)
    gpt2 = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(8)
    gpt2.save_pretrained(tmp_path / "gpt2")
    for path in model.glob("token*"):
        shutil.copy(path, tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    options = ["--ratio", "1.1", "--dataset", tmp_path / "text.txt", "--tokens", "100", "--json"]
    result = qguard("attack", "weight-noise", tmp_path / "gpt2", tmp_path / "out", *options)
    assert (result.code, result.err) == (0, "")
    before, after = load_file(file), load_file(tmp_path / "out" / "model.safetensors")
    changed = {f"transformer.{name}" for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(result.json["tensors"])
    assert len(changed) == 4
