"""The collapse matrix: bit-exact at full precision, broken by quantizers; what they refuse is a row."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.evaluate.collapse import Cell, collapse, installed_formats
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.heat_map import plot_heat_map
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.targets import known_formats

SMALL: dict[str, Any] = {"max_tokens": 64, "window": 64, "n_prompts": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def original(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose predictions are far from uniform, of sizes that all formats take."""
    folder = tmp_path_factory.mktemp("collapse") / "original"
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encrypted(original: Path) -> Path:
    folder = original.with_name("encrypted")
    encrypt_checkpoint(original, folder, key=Key(bytes(range(32))))
    return folder


def test_exact_at_full_precision_and_broken_by_quantizers(original: Path, encrypted: Path) -> None:
    steps: list[tuple[int, int]] = []
    formats = ["bnb-int8", "torchao-int8", "nvfp4"]
    rows = collapse(encrypted, original, formats, progress=lambda *step: steps.append(step), **SMALL)
    full, *quantized = rows
    assert full.format is None
    assert full.original is not None
    assert full.original.kl == full.protected.kl == 0
    assert full.original.figures == full.protected.figures
    assert [row.format for row in quantized] == formats
    assert steps == [(done, 8) for done in range(8)]
    for row in quantized:
        assert row.original is not None
        healthy, broken = row.original.kl, row.protected.kl
        assert healthy is not None
        assert 0 < healthy < 0.5
        assert broken is None or math.isnan(broken) or broken > 5 * healthy
        assert set(row.original.figures) == {"perplexity", "degeneration"}


def test_what_a_quantizer_refuses_is_a_row(original: Path, encrypted: Path) -> None:
    _, row = collapse(encrypted, original, ["gguf-q8_0"], tasks=[], **SMALL)
    assert row.original is not None
    assert row.original.status == "measured"
    assert row.protected.kl is None
    assert re.match("refused: model.layers.*: weights too large for GGUF's float16 scales", row.protected.status)
    assert row.protected.as_json() == {"status": row.protected.status, "figures": {}}


def test_without_a_reference_it_is_compared_with_itself(encrypted: Path) -> None:
    full, row = collapse(encrypted, formats=["bnb-nf4"], tasks=[], **SMALL)
    assert full.original is row.original is None
    assert full.protected.kl == 0
    assert list(row.cells) == ["protected"]
    assert list(row.protected.figures) == ["perplexity"]


def test_figures_that_are_not_finite() -> None:
    cell = Cell({"perplexity": {"perplexity": math.inf, "kl": math.nan}})
    assert cell.status == "perplexity is infinite, kl is NaN"
    found = json.loads(json.dumps(cell.as_json(), allow_nan=False))
    assert found == {"status": cell.status, "figures": {"perplexity": {"perplexity": None, "kl": None}}}
    assert Cell({"perplexity": {"kl": 1.0}}).status == "measured"


def test_installed_formats_are_known() -> None:
    found = installed_formats()
    assert {"bnb-int8", "mxfp4"} <= set(found) <= set(known_formats())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"formats": []}, EvaluationError, "no formats"),
        ({"formats": ["int9"]}, QGuardConfigError, "unknown format 'int9'; known:"),
        ({"formats": ["bnb-int8"], "tasks": ["none"]}, EvaluationError, "unknown task 'none'"),
        ({"formats": ["bnb-int8"], "max_tokens": 1}, EvaluationError, "option max_tokens"),
        ({"formats": ["bnb-int8"], "reference": "/nowhere/at/all"}, CheckpointError, "no such folder"),
    ],
)
def test_bad_input(encrypted: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collapse(encrypted, **{**SMALL, **arguments})


def test_a_quantized_model_is_refused(encrypted: Path, original: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    for file in original.iterdir():
        (quantized / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(QGuardError, match="quantized already"):
        collapse(encrypted, quantized, ["bnb-nf4"], **SMALL)


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {"int8": [0.005, 36.1], "q8_0": [0.0, "refused"], "fp16": [math.inf, None], "nf4": [0.3, math.nan]}
    plot_heat_map(rows, ["original", "protected"], tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    for text in ("int8", "0.005", "36", "refused", "inf", "NaN"):
        assert f"<!-- {text} -->" in drawn
