"""The benchmark of nested widths' quality runs on a tiny model, and its rows say what they claim."""

import copy
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from nested_quality import STRIDE, WINDOW, measure
from tiny_models import save_tokenizer, tiny_model

from optimum_qguard.evaluate import standard_library_text
from optimum_qguard.evaluate.perplexity import kl_divergence
from optimum_qguard.precision import nest


def test_rows(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    model.save_pretrained(tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    rows = measure(Namespace(model=tmp_path, tokens=48, group_size=32, device="cpu"))
    assert [row["bits"] for row in rows] == [8, 7, 6, 5, 4, 3, 2]
    nested = nest(copy.deepcopy(model), 4, group_size=32)
    text = standard_library_text(8 * 48)
    expected = kl_divergence(model, nested, tokenizer, text, window=WINDOW, stride=STRIDE, max_tokens=48)
    assert rows[4]["nested KL"] == pytest.approx(expected, rel=1e-5)
    for row in rows:
        assert row["nested KL / direct KL"] == pytest.approx(row["nested KL"] / row["direct KL"])
