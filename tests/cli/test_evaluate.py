"""``qguard evaluate``: figures of a model as it is, quantized, and guarded; or one clear line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--max-tokens", 64, "--prompts", 2, "--max-new-tokens", 8, "--limit", 2)


@pytest.fixture
def model(tiny_llama: Path, save_byte_tokenizer: Callable[[Path], None], tmp_path: Path) -> Path:
    """The tiny Llama with a tokenizer of bytes."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    save_byte_tokenizer(folder)
    return folder


def test_as_it_is(qguard: Callable[..., Any], model: Path) -> None:
    result = qguard("evaluate", model, *SMALL)
    assert (result.code, result.err) == (0, "")
    for word in ("as it is", "perplexity", "max_repeat_3", "seq_rep_4"):
        assert word in result.out
    (found,) = qguard("evaluate", model, "--json", *SMALL).json["evaluations"]
    assert (found["format"], found["evaluation"]["model"]) == (None, str(model))
    assert set(found["evaluation"]["results"]) == {"perplexity", "degeneration"}


def kls(result: Any) -> list[float]:
    return [each["evaluation"]["results"]["perplexity"]["figures"]["kl"] for each in result["evaluations"]]


def test_quantized_and_guarded_against_itself(qguard: Callable[..., Any], model: Path) -> None:
    options = ("--format", "bnb-int8", "--format", "bnb-nf4", "--tasks", "perplexity,marker", "--marker", "zz", *SMALL)
    plain = qguard("evaluate", model, *options, "--json").json
    assert plain["reference"] == str(model)
    assert [each["format"] for each in plain["evaluations"]] == ["bnb-int8", "bnb-nf4"]
    int8, nf4 = kls(plain)
    assert 0 < int8 < nf4
    guarded = qguard("evaluate", model, *options, "--json", "--guard").json
    assert [each["guard"] for each in guarded["evaluations"]] == [True, True]
    noisy_int8, noisy_nf4 = kls(guarded)
    assert noisy_int8 != int8
    assert noisy_nf4 > nf4
    shown = qguard("evaluate", model, *options, "--guard")
    assert "bnb-nf4, guarded" in shown.out
    assert f"Compared with {model}." in shown.out


def test_bad_input(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert "unknown task 'all'; known: arithmetic," in refused("evaluate", model, "--tasks", "all")
    assert "--guard guards a quantization" in refused("evaluate", model, "--guard")
    assert "unknown format 'int9'; known:" in refused("evaluate", model, "--format", "int9")
    assert "no such folder" in refused("evaluate", tmp_path / "none")
    assert "the task similarity compares" in refused("evaluate", model, "--tasks", "similarity")
    assert "give it as TASK=SOURCE" in refused("evaluate", model, "--data", "squad")
    assert "option limit" in refused("evaluate", model, "--limit", "0")
    assert "1000 prompts: there are" in refused("evaluate", model, "--prompts", "1000", "--tasks", "degeneration")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused("evaluate", model)
