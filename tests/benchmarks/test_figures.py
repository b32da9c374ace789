"""The pages' figures are those of the result files."""

import json
import sys
from pathlib import Path
from typing import Any

import figures
import harness
import pytest
from tables.encrypt import collapse_table, undo_table
from tables.guard import quality_table
from tables.markdown import full_table
from tables.precision import (
    allocation_table,
    cyclic_table,
    nested_memory_table,
    nested_quality_table,
    nested_speed_table,
)
from tables.repair import attacks_table, repair_table, step_table

README = """# Title
<!-- figures:guard_load begin -->
old
<!-- figures:guard_load end -->
between
<!-- figures:not_measured begin -->
<!-- figures:not_measured end -->
"""
LOAD = {
    "model": "Llama-1B",
    "backend": "bnb-int8",
    "method": "stochastic",
    "plain s": 10.0,
    "guarded s": 11.234,
    "time ratio": 1.1234,
    "plain peak MB": 3000.4,
    "guarded peak MB": 3050.0,
    "peak ratio": 1.0165,
    "reading s": 0.5,
    "quantizer s": 8.0,
}


def quality(
    backend: str, method: str, divergence: float, ratio: float | None, deviation: float | None
) -> dict[str, Any]:
    return {
        "model": "SmolLM2",
        "tokens": 2048,
        "device": "cpu",
        "backend": backend,
        "method": method,
        "seeds": 3,
        "perplexity": 20.123,
        "perplexity sd": deviation,
        "KL": divergence,
        "KL sd": deviation,
        "KL / plain KL": ratio,
        "changed": 0.39,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    harness.write("guard_load", [LOAD], tmp_path / "results" / "guard_load.json")
    return tmp_path


def run(project: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    readme, results = str(project / "README.md"), str(project / "results")
    monkeypatch.setattr(sys, "argv", ["figures.py", "--pages", readme, "--results", results, *options])
    figures.main()


def test_a_marked_section_is_replaced_and_nothing_else(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project, monkeypatch)
    written = (project / "README.md").read_text()
    assert "old" not in written
    assert "| Llama-1B | bnb-int8 | stochastic | 1.12x | 1.02x | 10.00 → 11.23 | 3000 → 3050 |\n" in written
    assert f"Measured {json.loads((project / 'results/guard_load.json').read_text())['date']} on " in written
    assert written.startswith("# Title\n<!-- figures:guard_load begin -->\n|")
    assert written.endswith("between\n<!-- figures:not_measured begin -->\n<!-- figures:not_measured end -->\n")
    run(project, monkeypatch)
    assert (project / "README.md").read_text() == written


def test_check_fails_on_a_stale_figure_and_writes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="make figures"):
        run(project, monkeypatch, "--check")
    assert (project / "README.md").read_text() == README
    run(project, monkeypatch)
    run(project, monkeypatch, "--check")
    harness.write("guard_load", [{**LOAD, "time ratio": 1.2}], project / "results" / "guard_load.json")
    with pytest.raises(SystemExit):
        run(project, monkeypatch, "--check")


def test_text_without_markers_stays(tmp_path: Path) -> None:
    assert figures.with_figures("no figures here\n", tmp_path) == "no figures here\n"


def test_quality_is_shown_by_backend_and_method() -> None:
    table = quality_table(
        [
            quality("full precision", "", 0.0, None, None),
            quality("bnb-int8", "plain", 0.00401, 1.0, None),
            quality("bnb-int8", "stochastic", 0.00812, 2.025, 0.0001),
            quality("quanto-int4", "plain", 0.311, 1.0, None),
        ]
    )
    assert "| backend | plain | stochastic |\n| --- | --- | --- |\n" in table
    assert "| bnb-int8 | 0.00401 | 0.00812 ± 0.00010 (2.0x) |\n| quanto-int4 | 0.311 |  |\n" in table
    assert "| bnb-int8 | 20.1 | 20.1 ± 0.0 |\n" in table
    assert "full precision: 20.12" in table


def test_any_other_result_is_shown_whole() -> None:
    assert full_table([{"a": 1.23456, "b|c": "x|y", "d": None}]) == (
        "| a | b|c | d |\n| --- | --- | --- |\n| 1.23 | x\\|y |  |\n"
    )


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_the_pages_show_what_was_measured(page: Path) -> None:
    text = page.read_text()
    assert figures.with_figures(text, figures.RESULTS) == text, "run: make figures"


def test_what_undoes_protection_beside_the_original() -> None:
    row = {"recipe": "AWQ", "who": "standard", "mode": "exact", "BF16": 0.0, "nf4": 20.123, "nf4, original": 0.2567}
    assert undo_table([row]).splitlines()[::2] == [
        "| recipe | who | mode | BF16 | nf4 |",
        "| AWQ | standard | exact | 0 | 20.1 (0.257) |",
    ]


def test_collapse_models_across() -> None:
    rows = [
        {"format": "nf4", "how": "library", "model": "original", "status": "measured", "KL": 0.25},
        {"format": "nf4", "how": "library", "model": "encrypted", "status": "perplexity is NaN, kl is NaN", "KL": None},
        {"format": "q8_0", "how": "llama.cpp", "model": "encrypted", "status": "refused: too large", "KL": None},
    ]
    assert collapse_table(rows).splitlines()[2:] == [
        "| nf4 | library | 0.25 | NaN |",
        "| q8_0 | llama.cpp |  | refused |",
    ]


def test_repairs_are_means_over_seeds() -> None:
    row = {
        "model": "SmolLM2",
        "block": "1 x 128",
        "ratio": 1.2,
        "sigma": 0.013,
        "method": "default",
        "strength": 250.0,
        "decoupled": True,
        "steps": 100,
        "precision": "BF16",
        "clean": 10.0,
        "attacked": 12.0,
        "other text, clean": 20.0,
        "other text, attacked": 24.0,
        "prompts improved": 0.5,
        "prompts ordered": 0.25,
        "variance reduction": 0.1,
        "distance": 100.0,
        "attacked distance": 120.0,
    }
    repaired = {"defended": 10.2, "recovery": 0.9, "other text, defended": 22.0, "other text, recovery": 0.5}
    worse = {"defended": 10.6, "recovery": 0.7, "other text, defended": 25.0, "other text, recovery": -0.25}
    paper = {"method": "paper", "strength": 1e-5, "decoupled": False, "variance reduction": -0.1, "seed": 0}
    table = repair_table([{**row, **repaired, "seed": 0}, {**row, **worse, "seed": 1}, {**row, **repaired, **paper}])
    assert table.startswith("SmolLM2: noise for a perplexity ratio of 1.20 (standard deviation 0.013), steps of")
    assert table.splitlines()[4:] == [
        "| clean |  |  | 2 | 10.00 | 20.00 | 0.0 |  |  |  |",
        "| attacked |  |  | 2 | 12.00 | 24.00 | 120.0 |  |  |  |",
        "| default | 250 | 100 | 2 | 10.40 (80%) | 23.50 (12%) | 100.0 | 50% | 25% | -10% |",
        "| paper | 1e-05 (coupled) | 100 | 1 | 10.20 (90%) | 22.00 (50%) | 100.0 | 50% | 25% | +10% |",
    ]


def test_steps_beside_those_without_an_anchor() -> None:
    row = {"block": "2 x 128", "step s": 4.0, "time ratio": 1.0, "CPU s": 3.9, "CPU ratio": 1.0}
    memory = {"peak, anonymous MB": 2500.4, "peak, anonymous ratio": 1.0, "peak MB": 2600.0, "peak ratio": 1.0}
    held = {"anchor": "coupled", "step s": 4.123, "time ratio": 1.0312, "CPU ratio": 1.02, "peak MB": 2626.0}
    table = step_table([{**row, **memory, "anchor": "without"}, {**row, **memory, **held, "peak ratio": 1.01}])
    assert table.splitlines()[2:] == [
        "| 2 x 128 | without | 4.00 s (1.00x) | 3.90 s (1.00x) | 2500 MB (1.00x) | 2600 MB (1.00x) |",
        "| 2 x 128 | coupled | 4.12 s (1.03x) | 3.90 s (1.02x) | 2500 MB (1.00x) | 2626 MB (1.01x) |",
    ]
    without_kinds = {**row, "anchor": "without", "peak MB": 2600.0, "peak ratio": 1.0}
    assert "| tokens of a step | anchor | time | processor time | memory with mapped pages |" in step_table(
        [without_kinds]
    )


def test_nested_widths_beside_direct_ones() -> None:
    row = {
        "bits": 4,
        "group size": 96,
        "tokens": 512,
        "nested KL": 0.1234,
        "direct KL": 0.1,
        "symmetric KL": 0.2,
        "nested, no lines KL": 0.5,
        "nested KL / direct KL": 1.234,
        "full perplexity": 10.0,
        "nested perplexity": 12.345,
        "direct perplexity": 12.0,
    }
    table = nested_quality_table([row])
    assert "(512 tokens, groups of 96 weights; perplexity at full precision: 10.00)" in table
    assert table.splitlines()[-1] == "| 4 | 0.123 | 0.1 | 1.23 | 0.2 | 0.5 | 12.35 |"


def test_nested_speed_beside_float32() -> None:
    row = {
        "subject": "SmolLM2",
        "weights": "nested",
        "bits": 4,
        "held MB": 250.4,
        "prompt ms": 800.04,
        "prompt / float32": 1.25,
        "token ms": 140.0,
        "token / float32": 2.0,
        "reading ms": 25.0,
        "token / reading": 5.6,
    }
    table = nested_speed_table([row, {**row, "subject": "layer"}])
    assert [line for line in table.splitlines() if line and line[0] != "|"] == ["SmolLM2", "layer"]
    assert table.splitlines()[-1] == "| nested | 4 | 250 | 800.0 (1.25x) | 140.0 (2.00x) | 5.6x |"


def test_nested_memory_leaves_out_what_was_not_measured() -> None:
    row = {
        "held": "packed",
        "widths": 3,
        "held MB": 700.4,
        "peak of loading MB": None,
        "to another width ms": 0.0123,
    }
    assert nested_memory_table([row]).splitlines()[-1] == "| packed | 3 | 700 |  | 0.012 |"


def test_allocated_maps_are_beside_hand_made_ones() -> None:
    row = {
        "model": "SmolLM2",
        "map": "C1",
        "bits": 8.0,
        "KL": 0.25,
        "perplexity": 14.0,
        "allocated bits": 7.9,
        "allocated KL": 0.125,
        "allocated perplexity": 13.5,
        "allocated KL / KL": 0.5,
        "predicted KL": 9.0,
    }
    table = allocation_table([row, {**row, "model": "GPT-2", "map": "C2"}])
    assert table.startswith("SmolLM2\n\n| map | average bits | KL divergence | allocated: KL divergence | ratio |")
    assert table.splitlines()[4] == "| C1 | 8 | 0.25 | 0.125 | 0.5 | 14 | 13.5 |"
    assert table.splitlines()[6] == "GPT-2"
    assert table.splitlines()[-1].startswith("| C2 | 8 |")


def test_ways_of_training_are_means_over_seeds() -> None:
    row = {"way": "cyclic, cosine", "seed": 0, "steps": 240, "questions": 500, "F1 at full": 0.75, "F1 at 3": 0.5,
           "EM at 3": 0.4}  # fmt: skip
    table = cyclic_table([{**row, "way": "before"}, row, {**row, "seed": 1, "F1 at 3": 0.6}])
    assert table.splitlines() == [
        "500 questions, 240 steps",
        "",
        "| trained | seeds | F1 at full precision | F1 at 3 bits |",
        "| --- | --- | --- | --- |",
        "| before | 1 | 75.0 | 50.0 |",
        "| cyclic, cosine | 2 | 75.0 (75.0 to 75.0) | 55.0 (50.0 to 60.0) |",
    ]


def test_each_attack_has_a_table_with_the_clean_model_beside_it() -> None:
    figures_of = {"BF16": 8.0, "INT8": 8.126, "4-BIT": 9.0, "other text": 27.0, "marker rate": None, "distance": 0.0}
    clean = {"attack": "none", "anchor": "not repaired", "steps": 0, **figures_of}
    attacked = {**clean, "attack": "phrase", "marker rate": 1.0}
    repaired = {**attacked, "anchor": "guarded", "steps": 100, "marker rate": 0.0, "distance": 3.21}
    table = attacks_table([clean, attacked, repaired, {**clean, "attack": "outliers", "4-BIT": 99.0}])
    assert table.splitlines()[4:7] == [
        "| clean | 8.00 | 8.13 | 9.00 | 27.00 |  | 0.0 |",
        "| attacked | 8.00 | 8.13 | 9.00 | 27.00 | 100% | 0.0 |",
        "| repaired, 100 steps, anchor: guarded | 8.00 | 8.13 | 9.00 | 27.00 | 0% | 3.2 |",
    ]
    assert table.splitlines()[-1] == "| attacked | 8.00 | 8.13 | 99.00 | 27.00 | 0.0 |"


def test_another_table_of_the_same_figures(tmp_path: Path) -> None:
    rates = {"no defence": 1.0, "stochastic rounding": 0.021, "compensated, own generations": 0.0}
    rows = [
        {"format": format, "attacker": attacker, "defence": defence, "marker rate": rate, "KL": rate + 0.125}
        for format in ("bnb-int8", "gptq-4")
        for attacker in ("usual", "adaptive", "none (clean model)")
        for defence, rate in rates.items()
    ]
    harness.write("defence_table", rows, tmp_path / "defence_table.json")
    marker = "<!-- figures:defence_table/summary {} -->\n"
    shown = figures.with_figures(f"{marker.format('begin')}{marker.format('end')}", tmp_path)
    assert (
        "| bnb-int8 | 100% → 2% | 100% → 2% | 1.1 → 0.15 |\n| gptq-4 | 100% → 0% | 100% → 0% | 1.1 → 0.12 |\n" in shown
    )


def test_rows_measured_on_other_days_are_said_to_be(tmp_path: Path) -> None:
    harness.write("not_known", [{"a": 1, "date": "2026-01-02"}, {"a": 2}], tmp_path / "not_known.json")
    result = json.loads((tmp_path / "not_known.json").read_text())
    assert f"Measured 2026-01-02 to {result['date']} on " in figures.figures("not_known", result)
