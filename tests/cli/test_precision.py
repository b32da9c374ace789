"""``qguard precision allocate``: a map, what it gives, and files; or one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qguard import BitMap, PrecisionConfig
from optimum_qguard.evaluate.perplexity import perplexity_and_kl
from optimum_qguard.precision import sensitivity
from optimum_qguard.precision.decoding import decoded

TEXT = " ".join(f"w{3 + index * 7 % 500}" for index in range(200))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model that predicts something, and a text beside it."""
    made = tiny_model(request.param)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    made.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


def test_a_map_and_what_it_gives(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    options = ["--text", tmp_path / "text.txt", "--tokens", 64, "--sensitivity", tmp_path / "kept.json"]
    files = ["--output", tmp_path / "map.yaml", "--plot", tmp_path / "map.png"]
    result = qguard("precision", "allocate", model, "--bits", 4.5, *options, *files, "--json")
    assert (result.code, result.err) == (0, "")
    full, four, five, allocated = result.json["maps"]
    assert [row["map"] for row in (full, four, five)] == ["full precision", "uniform 4", "uniform 5"]
    assert full["kl"] == 0
    assert allocated["average_bits"] <= 4.5
    assert allocated["predicted_kl"] < four["predicted_kl"]
    bitmap = BitMap.load(tmp_path / "map.yaml")
    assert bitmap.to_dict() == result.json["bitmap"]
    full_precision = AutoModelForCausalLM.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert allocated["average_bits"] == bitmap.average_bits(loaded)
    held_out = TEXT[len(TEXT) // 2 :]
    with decoded(loaded, bitmap.resolve(loaded)):
        quality = perplexity_and_kl(
            full_precision, loaded, AutoTokenizer.from_pretrained(model), held_out, max_tokens=64
        )
    assert (allocated["kl"], allocated["perplexity"]) == pytest.approx((quality.kl, quality.perplexity), rel=1e-6)
    assert (tmp_path / "map.png").stat().st_size > 10_000
    shown = qguard("precision", "allocate", model, "--bits", 4.5, *options, "--output", tmp_path / "map.json")
    assert (shown.code, shown.err) == (0, "")
    kinds = {name.split(".", 3)[3] for name in bitmap.to_dict()}
    for word in (*kinds, "allocated", "uniform 4", f"Written: {tmp_path / 'map.json'}"):
        assert word in shown.out
    assert BitMap.load(tmp_path / "map.json") == bitmap


def test_the_map_loads(qguard: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tiny_llama)
    made.save_pretrained(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    options = ["--bits", 3, "--text", tmp_path / "text", "--tokens", 32, "--group-size", 0]
    result = qguard("precision", "allocate", tmp_path, *options, "--output", tmp_path / "map.yaml", "--json")
    assert result.json["group_size"] is None
    config = PrecisionConfig(BitMap.load(tmp_path / "map.yaml"), group_size=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"


def test_refused(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    command = ["precision", "allocate", tiny_llama, "--bits"]
    assert "an average width is between 2 and 8" in refused(*command, 9)
    assert "ends in one of .yaml" in refused(*command, 4, "--output", tmp_path / "map.txt")
    assert "a plot's name ends in" in refused(*command, 4, "--plot", tmp_path / "map.txt")
    assert "cannot be read as text" in refused(*command, 4, "--text", tmp_path / "none.txt")
    assert "has no tokenizer" in refused(*command, 4)
    for option in ("--output", "--sensitivity"):
        line = refused(*command, 4, option, tmp_path / "none" / "map.yaml")
        assert f"{tmp_path / 'none' / 'map.yaml'}: no such folder" in line
    assert "no such folder" in refused("precision", "allocate", tmp_path / "none", "--bits", 4)


def test_a_second_half_without_text_is_seen_before_measuring(
    refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "half.txt").write_text(TEXT + " " * (len(TEXT) + 2))
    options = ["--text", tmp_path / "half.txt", "--tokens", 32, "--sensitivity", tmp_path / "kept.json"]
    refused("precision", "allocate", model, "--bits", 4, *options)


def test_how_many_tokens(
    qguard: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than the text has; in whole sequences, and that is what is reported."""
    command = ["precision", "allocate", model, "--bits", 4, "--text", tmp_path / "text.txt", "--json", "--tokens"]
    assert "token(s) and 150 were asked for" in qguard(*command, 150).err
    monkeypatch.setattr(sensitivity, "SEQUENCE", 32)
    assert qguard(*command, 70).json["tokens"] == 64


def test_quantized_already(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    line = refused("precision", "allocate", model, "--bits", 4)
    assert line == f"qguard: {model}: is quantized already (gptq); name its full-precision original\n"
