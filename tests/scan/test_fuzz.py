"""Configuration, manifest, index and card may hold any JSON: both detectors have an answer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_qguard import scan
from tests.scan.malformed import INDEX, MODEL, SHARD, sharded, sound

fuzz = settings(max_examples=40, deadline=None)
number = st.sampled_from([0, 1, 2, -1, 64, 32, 10**18, 2**64, 0.5, float("inf")]) | st.integers()
word = st.text(max_size=4) | st.sampled_from(
    [
        *("encrypted", "float32", "bfloat16", "gpt2", "llama", "bitsandbytes", "a" * 64, "0" * 64, MODEL),
        *(SHARD.format(1), "model.layers.0.mlp.up_proj.weight", "../x", "/etc/passwd", "\x1b[2J", "a\nb"),
    ]
)
anything = st.recursive(
    st.none() | st.booleans() | number | word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3),
    max_leaves=6,
)


def objects(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys) | word, anything, max_size=6)


def check(folder: Path, **options: Any) -> None:
    report = scan(folder, detectors=["integrity", "provenance"], **options)
    assert not [run for run in report.detectors if run.state == "failed"], report.detectors
    assert report.reason.isprintable()
    assert all(finding.message.isprintable() for finding in report.findings)


config = objects("model_type", "dtype", "torch_dtype", "vocab_size", "hidden_size", "n_embd", "text_config", "auto_map")
quantization = st.fixed_dictionaries(
    {"quantization_config": st.fixed_dictionaries({"quant_method": anything}) | anything}
)


@fuzz
@given(config, config, quantization)
def test_configurations(content: dict[str, Any], text: dict[str, Any], quantization: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sound(Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(content | {"text_config": text} | quantization))
        check(Path(folder))


fields = ["kind", "schema_version", "key_fingerprint", "tensors", "files", "seed", "fresh_seed", "quantization_config"]


@fuzz
@given(objects(*fields), st.sampled_from(["encrypted", "guarded", "as it is"]), st.booleans())
def test_manifests(content: dict[str, Any], kind: str, sound_otherwise: bool) -> None:
    good: dict[str, Any] = {"schema_version": 1, "key_fingerprint": "0" * 64, "tensors": {}, "files": {MODEL: "0" * 64}}
    if kind == "encrypted":
        content["kind"] = kind
    if kind == "guarded":
        good = {"schema_version": 1, "seed": "0" * 64, "fresh_seed": True, "quantization_config": {}, "tensors": []}
    if sound_otherwise:
        content = good | content
    with tempfile.TemporaryDirectory() as folder:
        sound(Path(folder))
        (Path(folder) / "qguard.json").write_text(json.dumps(content))
        check(Path(folder), full=True)


@fuzz
@given(objects("metadata"), st.dictionaries(word, word, max_size=4) | anything, anything)
def test_indices(content: dict[str, Any], weight_map: Any, total: Any) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = sharded(Path(parent) / "model")
        content = {"weight_map": weight_map, "metadata": {"total_size": total}} | content
        (folder / INDEX).write_text(json.dumps(content))
        check(folder)


@fuzz
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100) | anything.map(json.dumps), st.binary(max_size=20)
)
def test_cards(header: str, rest: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sound(Path(folder))
        (Path(folder) / "README.md").write_bytes(f"---\ntags: {header}\n---\n".encode() + rest)
        check(Path(folder))
