"""The benchmark of nested widths' speed runs on a tiny model, and its rows say what they claim."""

from argparse import Namespace
from pathlib import Path

import nested_speed
import pytest
import torch
from nested_speed import held_bytes, measure
from tiny_models import save_tiny
from torch import nn


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without quanto's int4 and int2, which compile an extension for minutes.
    ways = {way: each for way, each in nested_speed.WAYS.items() if way not in ("quanto int4", "quanto int2")}
    monkeypatch.setattr(nested_speed, "WAYS", ways)
    folder = save_tiny("llama-tied", tmp_path)
    rows = measure(Namespace(model=folder, features=256, repeats=2, device="cpu"))
    for subject in (str(folder), "linear 256 x 256"):
        found = {(row["weights"], row["bits"]): row for row in rows if row["subject"] == subject}
        assert len(found) == len(ways) - 1 + 7
        assert found["float32", 32]["prompt / float32"] == found["float32", 32]["token / float32"] == 1
        for row in found.values():
            assert row["token / reading"] == pytest.approx(row["token ms"] / row["reading ms"])  # type: ignore[operator]
        sizes = [found[key]["held MB"] for key in (("float32", 32), ("BF16", 16), ("nested", 8), ("nested", 2))]
        assert sizes[0] > sizes[1] > sizes[2] == sizes[3]  # type: ignore[operator]


def test_held_bytes() -> None:
    one = nn.Linear(256, 128, bias=False)
    two = nn.Linear(256, 128, bias=False)
    two.weight = one.weight
    assert held_bytes(nn.Sequential(one, two)) == 4 * 256 * 128
    quantized = nn.Sequential(nn.Linear(256, 128, bias=False))
    nested_speed.WAYS["torchao intx"][2](quantized)
    parts = list(nested_speed.plain_tensors(quantized[0].weight))
    assert {part.dtype for part in parts} >= {torch.int8, torch.float32}
    # A byte a weight; a scale and a zero point of at most 4 bytes for 32 of them.
    assert 256 * 128 < held_bytes(quantized) <= 256 * 128 * (1 + 8 / 32)
