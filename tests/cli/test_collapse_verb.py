"""``qguard collapse``: the matrix as a table, as JSON and as a picture; or one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint

SMALL = ("--max-tokens", 64, "--prompts", 2, "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def original(
    tiny_llama: Path, save_byte_tokenizer: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama with a tokenizer of bytes."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("collapse") / "original"))
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encrypted(original: Path) -> Path:
    folder = original.with_name("encrypted")
    encrypt_checkpoint(original, folder, key=Key(bytes(range(32))))
    return folder


def test_json_and_plot(qguard: Callable[..., Any], original: Path, encrypted: Path, tmp_path: Path) -> None:
    plot = tmp_path / "map.png"
    arguments = ("collapse", encrypted, "--reference", original, "--formats", "torchao-int8,gguf-q8_0", *SMALL)
    result = qguard(*arguments, "--plot", plot, "--json")
    assert (result.code, result.err) == (0, "")
    assert plot.stat().st_size > 1000
    found = result.json
    assert (found["model"], found["reference"], found["plot"]) == (str(encrypted), str(original), str(plot))
    full, int8, q8_0 = found["rows"]
    assert [row["format"] for row in found["rows"]] == [None, "torchao-int8", "gguf-q8_0"]
    assert full["original"] == full["protected"]
    assert full["protected"]["figures"]["perplexity"]["kl"] == 0
    healthy, broken = (int8[name]["figures"]["perplexity"]["kl"] for name in ("original", "protected"))
    assert broken is None or broken > 100 * healthy > 0
    assert q8_0["original"]["status"] == "measured"
    assert q8_0["protected"]["status"].startswith("refused: model.layers.0.")
    assert q8_0["protected"]["figures"] == {}


def test_table(qguard: Callable[..., Any], original: Path, encrypted: Path) -> None:
    result = qguard("collapse", encrypted, "--reference", original, "--formats", "gguf-q8_0", *SMALL)
    assert (result.code, result.err) == (0, "")
    for text in ("full precision", "gguf-q8_0", "kl", "max_repeat_3", "refused", "weights too large"):
        assert text in result.out
    assert f"KL divergence is from {original} at full precision" in result.out
    alone = qguard("collapse", encrypted, "--formats", "bnb-nf4", "--tasks", "", *SMALL, "--json").json
    assert [set(row) for row in alone["rows"]] == [{"format", "protected"}] * 2
    assert json.dumps(alone["rows"][0]["protected"]["figures"]["perplexity"]["kl"]) == "0.0"


def test_bad_input(refused: Callable[..., str], original: Path, encrypted: Path, tmp_path: Path) -> None:
    assert "unknown format 'int9'; known:" in refused("collapse", encrypted, "--formats", "int9")
    assert "no formats" in refused("collapse", encrypted, "--formats", "")
    assert "no such folder" in refused("collapse", tmp_path / "none", "--formats", "bnb-int8")
    assert "unknown task 'all'" in refused("collapse", encrypted, "--formats", "bnb-int8", "--tasks", "all")
    assert "a plot's name ends in" in refused("collapse", encrypted, "--plot", tmp_path / "map.txt")
    assert "option max_tokens" in refused("collapse", encrypted, "--formats", "bnb-int8", "--max-tokens", 1)
    assert "give it as TASK=SOURCE" in refused("collapse", encrypted, "--data", "squad")
