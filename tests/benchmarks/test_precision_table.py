"""How runs become rows; that attackers get what the table says; the runs themselves are the benchmark."""

import json
from functools import partial
from pathlib import Path

import attacked_answers
import precision_table
import pytest
import torch
from attacked_answers import ADAPTIVE, CLEAN, ITSELF, KNOWLEDGE, TRANSFERRED, Budget, Defence, Subject
from figures import figures
from precision_table import REFERENCE, STRONGEST, compact, draw, strongest, table, verdict
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from optimum_qguard.evaluate.generated_squad import generated_passages
from optimum_qguard.evaluate.interval import Interval, bootstrap
from optimum_qguard.evaluate.robustness import attack_questions, pgd
from optimum_qguard.precision.switch import bits

QUESTIONS = 40
GROUPS = torch.arange(QUESTIONS) // 4
SWITCH = "switch 4/8, per request"


def random_scores(seed: int, highest: float = 1.0) -> Tensor:
    return highest * torch.rand(QUESTIONS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def clean() -> dict[str, Tensor]:
    return {REFERENCE: 0.4 + 0.6 * random_scores(0), SWITCH: 0.4 + 0.6 * random_scores(1)}


@pytest.fixture
def attacked() -> dict[tuple[str, str, str], Tensor]:
    return {
        (REFERENCE, "PGD", TRANSFERRED): random_scores(2),
        (REFERENCE, "PGD", ITSELF): random_scores(3, 0.6),
        (SWITCH, "PGD", TRANSFERRED): random_scores(4, 0.9),
        (SWITCH, "PGD", ITSELF): random_scores(5, 0.5),
        (SWITCH, "PGD", ADAPTIVE): random_scores(6, 0.3),
    }


def test_rows(clean: dict[str, Tensor], attacked: dict[tuple[str, str, str], Tensor], tmp_path: Path) -> None:
    rows = table("GPT-2", clean, attacked, GROUPS)
    by_cell = {(row["defence"], row["attacker uses"]): row for row in rows}
    assert len(by_cell) == len(rows) == 7
    row = by_cell[SWITCH, ADAPTIVE]
    mine, its = attacked[SWITCH, "PGD", ADAPTIVE], attacked[REFERENCE, "PGD", ITSELF]
    difference = bootstrap(mine - its, groups=GROUPS)
    name = "adversarial F1 - static 8-bit"
    assert [row[name], row[f"{name} low"], row[f"{name} high"]] == pytest.approx(
        [difference.estimate, difference.low, difference.high]
    )
    assert row["change - static 8-bit"] == pytest.approx(
        float((mine - clean[SWITCH] - its + clean[REFERENCE]).mean()), abs=1e-6
    )
    answered = (clean[SWITCH] >= 0.5) & (clean[REFERENCE] >= 0.5)
    assert 0 < row["answered by all"] == int(answered.sum()) < QUESTIONS
    assert row["adversarial F1, answered by all"] == pytest.approx(float(mine[answered].mean()))
    assert by_cell[SWITCH, STRONGEST]["adversarial F1"] == row["adversarial F1"]
    assert by_cell[REFERENCE, STRONGEST]["adversarial F1"] == pytest.approx(float(its.mean()))
    assert by_cell[REFERENCE, ITSELF][name] is None
    assert [row["verdict"] is not None for row in rows] == [cell == (SWITCH, STRONGEST) for cell in by_cell]
    assert len({tuple(row) for row in rows}) == 1, "the same columns in each"
    assert compact(row)["adversarial F1"] == f"{mine.mean():.3f} [{row['adversarial F1 low']:.3f}, {row['adversarial F1 high']:.3f}]"  # fmt: skip  # noqa: E501
    draw(rows, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
    machine = {"cpu": "a", "cores": 1, "memory": "1 GiB", "gpu": None}
    result = {"name": "precision_table", "date": "now", "machine": machine, "versions": {}, "rows": rows}
    shown = figures("precision_table", result)
    assert (
        "| defence | clean | attacked by the gradients of full precision | attacked by the gradients of the defended "
        "model | attacked by the gradients of all its widths | under what hurts most, less that of static 8-bit |"
    ) in shown
    compared = compact(by_cell[SWITCH, STRONGEST])
    cells = [compact(by_cell[SWITCH, each])["adversarial F1"] for each in KNOWLEDGE]
    assert " | ".join([SWITCH, compared["clean F1"], *cells, compared["adversarial F1 - static 8-bit"]]) in shown
    static = [compact(by_cell[REFERENCE, each])["adversarial F1"] for each in KNOWLEDGE[:2]]
    assert f"{static[0]} | {static[1]} |  |  |" in shown, (
        "a static model has no other widths, and nothing to differ from"
    )


def test_what_hurts_most_is_the_lowest_mean(attacked: dict[tuple[str, str, str], Tensor]) -> None:
    found = strongest(attacked)
    assert {key[2] for key in found} == {STRONGEST}
    for defence in (REFERENCE, SWITCH):
        means = [float(scores.mean()) for key, scores in attacked.items() if key[0] == defence]
        assert float(found[defence, "PGD", STRONGEST].mean()) == min(means)


def test_verdicts() -> None:
    better, worse, unclear = Interval(0.1, 0.05, 0.2), Interval(-0.1, -0.2, -0.05), Interval(0.1, -0.1, 0.2)
    assert verdict(better, unclear).startswith("higher")
    assert verdict(unclear, better).startswith("no difference")
    assert verdict(worse, unclear) == "lower F1 under attack than static 8-bit"
    assert "had less to lose" in verdict(worse, better)


def test_what_attackers_know() -> None:
    assert Defence().knowledge == (ITSELF,)
    assert Defence((8,)).knowledge == (TRANSFERRED, ITSELF)
    assert Defence((4, 8)).knowledge == KNOWLEDGE


def test_a_subject_is_attacked_where_it_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two-bit weights differ from full precision, so each kind of knowledge gives prompts of its own."""
    from tiny_gpt2 import _tokenizer

    monkeypatch.setattr(attacked_answers, "runs_folder", lambda: tmp_path / "runs")
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=len(tokenizer), n_positions=256,
                            initializer_range=0.2, eos_token_id=0)  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").is_fast
    subject = Subject(
        "tiny", tmp_path / "model", generated_passages(5, seed=0, split="validation"), Budget(0.3, 2, 2, 1),
        seed=0, max_new_tokens=3, device="cpu",
    )  # fmt: skip
    switch = Defence((2, 8), "request")
    prompts = [torch.cat(subject._prompts(switch, "PGD", knowledge)) for knowledge in KNOWLEDGE]
    assert not any(torch.equal(prompts[one], prompts[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(torch.cat(subject._prompts(Defence((8,)), "PGD", TRANSFERRED)), prompts[0])
    views = [partial(bits, subject.nested, width) for width in (2, 8)]
    attack = pgd(epsilon=0.3, steps=2, views=views)
    expected = attack_questions(subject.nested, subject.tokenizer, subject.questions, attack)
    assert torch.equal(prompts[2], torch.cat(expected)), "the average over all widths"
    lengths = [len(question.prompt) for question in subject.questions]
    assert lengths == sorted(lengths)
    scores = subject.scores(switch, CLEAN, "")
    assert scores.shape == subject.groups.shape == (5,)
    path = subject.run_file(switch, CLEAN, "")
    path.write_text(json.dumps({"f1": [0.25] * 5}))
    assert subject.scores(switch, CLEAN, "").tolist() == [0.25] * 5, "what was measured is kept"
    files = {subject.run_file(Defence((2, 8), per), "PGD", ITSELF) for per in ("forward", "request")}
    assert len(files | {subject.run_file(switch, "PGD", ADAPTIVE), subject.run_file(switch, "HotFlip", ITSELF)}) == 4


def test_other_results_are_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_table, "RESULTS", tmp_path)
    assert precision_table.sections() == {}
    (tmp_path / "allocation.json").write_text('{"rows": [{"bits": 5}]}')
    sections = precision_table.sections()
    precision_table.write("precision_table", [{"a": 1}], tmp_path / "out.json", sections)
    assert json.loads((tmp_path / "out.json").read_text())["sections"]["allocation"]["rows"] == [{"bits": 5}]
