"""A large repository on the Hub is scanned by a few requests for a small part of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_server.store import Blob

from optimum_qguard.scan.sample import SHARE
from optimum_qguard.scan.scanner import scan

LAYERS, SHARDS = 32, 8
HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 2048, 8192, 512, 128_256


def shapes() -> dict[str, tuple[int, ...]]:
    """Of a Llama of 2.2 billion weights, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KEYS, HIDDEN),
            ("self_attn.v_proj", KEYS, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ):
            found[f"{prefix}{name}.weight"] = rows, columns
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,)}


def write_sparse(folder: Path) -> dict[str, bytes | Path]:
    """Shards of zeros that take no place on the disk."""
    header: dict[str, dict[str, object]] = defaultdict(dict)
    index, ends = {}, [0] * SHARDS
    for number, (name, shape) in enumerate(shapes().items()):
        shard = number * SHARDS // len(shapes())
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        start, ends[shard] = ends[shard], ends[shard] + 2 * math.prod(shape)
        header[file][name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, ends[shard])}
        index[name] = file
    files: dict[str, bytes | Path] = {}
    for file, end in zip(header, ends, strict=True):
        text = json.dumps(header[file]).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        files[file] = folder / file
    files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    files["config.json"] = json.dumps({"model_type": "llama", "num_attention_heads": 32}).encode()
    return files


def test_a_quick_scan_reads_a_small_part_of_a_large_repository(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server would read 4 GB to know their hashes, which nobody asks for.
    monkeypatch.setattr(Blob, "sha256", "0" * 64)
    files = write_sparse(tmp_path)
    hub.add_repository("org/large", files)
    hub.requests.clear()
    report = scan("org/large", seed=1)
    assert not [run for run in report.detectors if run.state == "failed"]
    coverage = report.coverage
    assert coverage.bytes > 4e9
    assert coverage.tensors_scanned == coverage.tensors_to_scan == len(shapes())
    assert coverage.weights_scanned >= 0.9 * SHARE * coverage.weights
    assert coverage.bytes_read <= 0.03 * coverage.bytes
    assert hub.bytes_sent() <= 0.03 * coverage.bytes
    # One for each tensor, two for each header; the CDN's address has to be asked for, and connections are few.
    parts = [request for request in hub.requests if ".safetensors" in request.path]
    assert len(parts) <= 2 * (len(shapes()) + 2 * SHARDS)
    assert len(hub.requests) - len(parts) <= 20
