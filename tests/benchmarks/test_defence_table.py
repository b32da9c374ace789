"""The published alternatives, and how runs become rows; the runs themselves are the benchmark."""

import json
from argparse import Namespace
from pathlib import Path

import defence_table
import pytest
import torch
from defence_table import CLEAN, DEFENCES, HIGH_ERROR, flip, subtract

from optimum_qguard.formats import get_format

INT8 = get_format("int8-rowwise")


def test_flip_rounds_high_errors_to_the_other_neighbour() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    before = INT8.quantize(weight)
    after = INT8.quantize(flip(weight, before))
    error = (weight / before.grid.scale) - (before.codes.float() - 127)
    high = error.abs() > HIGH_ERROR
    # The two largest error bands; float16 inside the library decides within a hundredth of a step.
    clear = (error.abs() - HIGH_ERROR).abs() > 0.01
    expected = before.codes.float() + torch.where(high, error.sign(), 0)
    assert torch.equal(after.codes.float()[clear], expected[clear])
    assert 0.35 < float(high.double().mean()) < 0.45


def test_subtract_takes_the_rounding_off_beforehand() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    quantized = INT8.quantize(weight)
    torch.testing.assert_close(subtract(weight, quantized), 2 * weight - quantized.dequantize())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(defence_table, "runs_folder", lambda: tmp_path)
    values = {(CLEAN, "no defence", 0): 0.01, ("usual", "no defence", 0): 0.1}
    values |= {("usual", "stochastic rounding", seed): 0.02 + 0.001 * seed for seed in range(3)}
    for (attacker, name, seed), kl in values.items():
        found = {"marker rate": 0.0, "perplexity": 20.0, "KL": kl, "accuracy": None, "changed": 0.25}
        defence_table.run_file("bnb-int8", attacker, name, seed).write_text(json.dumps(found))
    return tmp_path


def test_rows(runs: Path) -> None:
    rows = defence_table.table(Namespace(formats=["bnb-int8"], attackers=["usual", CLEAN], defences=list(DEFENCES)))
    assert [(row["attacker"], row["defence"], row["seeds"]) for row in rows] == [
        ("usual", "no defence", 1),
        ("usual", "stochastic rounding", 3),
        (CLEAN, "no defence", 1),
    ]
    assert rows[1]["KL"] == pytest.approx(0.021)
    assert rows[1]["KL sd"] == pytest.approx(0.001)
    assert rows[1]["KL / clean plain KL"] == pytest.approx(2.1)


def test_a_run_is_read_where_there_is_one(runs: Path) -> None:
    assert defence_table.run("bnb-int8", "usual", "no defence", 0)["KL"] == 0.1
    assert defence_table.is_impossible("gptq-4", "flip high errors")
    assert not defence_table.is_impossible("gptq-4", "stochastic rounding")
    assert not defence_table.is_impossible("bnb-nf4", "stochastic rounding")


def test_rows_of_other_formats_stay_with_their_date(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert defence_table.rows_of_other_formats(output, ["gptq-4"]) == []
    rows = [{"format": "gptq-4", "KL": 1.0}, {"format": "bnb-nf4", "KL": 2.0}, {"format": "bnb-int8", "KL": 3.0}]
    output.write_text(json.dumps({"date": "2026-01-02", "rows": rows}))
    kept = defence_table.rows_of_other_formats(output, ["gptq-4"])
    assert kept == [{"date": "2026-01-02", **row} for row in rows[1:]]
    new = {"format": "gptq-4", "KL": 4.0}
    assert [row["format"] for row in defence_table.in_order([new, *kept])] == ["bnb-int8", "bnb-nf4", "gptq-4"]
