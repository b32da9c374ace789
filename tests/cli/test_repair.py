"""``qguard repair``."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from repair_models import save_clean, save_damaged, words
from safetensors.torch import load_file

from optimum_qguard.cli import repair as verb
from optimum_qguard.repair import loop
from optimum_qguard.repair.recipe import Recipe
from optimum_qguard.repair.report import RepairReport

FAST = ["--steps", 4, "--block-size", 32, "--learning-rate", "1e-3", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``clean``, ``damaged`` and ``text.txt``; only to be read."""
    folder = tmp_path_factory.mktemp("models")
    save_damaged(save_clean("llama", folder / "clean"), folder / "damaged")
    (folder / "text.txt").write_text(words(400))
    return folder


def test_repaired(qguard: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    options = ["--anchor", models / "clean", "--data", models / "text.txt", *FAST]
    result = qguard("repair", models / "damaged", tmp_path / "out", *options)
    assert (result.code, result.err) == (0, "")
    report = RepairReport.model_validate_json((tmp_path / "out" / "repair.json").read_text())
    assert result.out == f"{report}. Written to {tmp_path / 'out'}.\n"
    assert "4 steps of 64 tokens: training loss " in result.out
    assert "distance to the anchor" in result.out
    assert report.anchor_distance_after < report.anchor_distance_before


def test_every_option(qguard: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    result = qguard(
        "repair", models / "damaged", tmp_path / "out", "--anchor", models / "clean", "--data", models / "text.txt",
        "--validation", models / "text.txt", "--steps", 6, "--strength", 0.5, "--coupled", "--modules", "q_proj,v_proj",
        "--learning-rate", "1e-4", "--warmup-steps", 1, "--block-size", 16, "--accumulate", 3, "--dtype", "bfloat16",
        "--device", "cpu", "--seed", 7, "--evaluate-every", 2, "--patience", 9, "--checkpoint-every", 0,
        "--keep-at", "2,4", "--resume", "--overwrite", "--json",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    report = result.json["report"]
    assert report == json.loads((tmp_path / "out" / "repair.json").read_text())
    assert report["recipe"] == {
        "steps": 6,
        "strength": 0.5,
        "decoupled": False,
        "modules": ["q_proj", "v_proj"],
        "learning_rate": 1e-4,
        "warmup_steps": 1,
        "block_size": 16,
        "accumulate": 3,
        "dtype": "bfloat16",
        "seed": 7,
        "evaluate_every": 2,
        "patience": 9,
        "checkpoint_every": 0,
    }
    assert [entry["step"] for entry in report["validation"]] == [0, 2, 4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2", "out-4"]


def test_steps_that_were_not_reached(qguard: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    """Validation ended training before them, and whoever waits for their weights is told."""
    (tmp_path / "other.txt").write_text(" ".join(f"w{index * 31 % 128}" for index in range(400)))
    (tmp_path / "narrow.txt").write_text(words(64))
    result = qguard(
        "repair", models / "damaged", tmp_path / "out", "--data", tmp_path / "narrow.txt", "--validation",
        tmp_path / "other.txt", "--steps", 40, "--block-size", 32, "--learning-rate", "3e-3", "--device", "cpu",
        "--evaluate-every", 4, "--patience", 1, "--checkpoint-every", 0, "--keep-at", "1,39,40",
    )  # fmt: skip
    report = RepairReport.model_validate_json((tmp_path / "out" / "repair.json").read_text())
    assert report.steps_trained < 39
    ended = f"Training ended at step {report.steps_trained}"
    assert (result.code, result.err) == (0, f"{ended}, so the weights after step 39, 40 are not there.\n")
    assert (tmp_path / "out-1").is_dir()


def test_a_data_set(qguard: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    """The same text as a file and as the column of a data set's rows."""
    pytest.importorskip("datasets")
    texts = words(400).split(" ")
    rows = [{"text": " ".join(texts[start : start + 100]), "id": start} for start in range(0, 400, 100)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": None, "id": 1}])))
    (tmp_path / "data.txt").write_text(" <end> ".join(row["text"] for row in rows))
    for suffix in ("jsonl", "txt"):
        out = tmp_path / suffix
        assert qguard("repair", models / "damaged", out, "--data", tmp_path / f"data.{suffix}", *FAST).code == 0
    first, second = (load_file(tmp_path / suffix / "model.safetensors") for suffix in ("jsonl", "txt"))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    (tmp_path / "other.jsonl").write_text('{"id": 1, "prompt": "w2"}')
    result = qguard("repair", models / "damaged", tmp_path / "out", "--data", tmp_path / "other.jsonl", *FAST)
    assert "has no text in a column 'text'; its columns are id, prompt" in result.err


def test_by_default_it_trains_on_pythons_documentation(
    qguard: Callable[..., Any], models: Path, tmp_path: Path, save_byte_tokenizer: Callable[[Path], None]
) -> None:
    clean = save_clean("llama", tmp_path / "clean", vocab_size=256)
    save_byte_tokenizer(clean)
    result = qguard("repair", clean, tmp_path / "out", *FAST)
    assert result.err.startswith("Trained on the documentation of Python's standard library; give --data for")
    report = RepairReport.model_validate_json((tmp_path / "out" / "repair.json").read_text())
    assert report.anchor is None
    assert report.losses[-1].step == 4


def test_the_help_shows_the_defaults(qguard: Callable[..., Any]) -> None:
    options = inspect.signature(verb.command, eval_str=True).parameters
    for field in fields(Recipe):
        if field.name in ("decoupled", "modules"):
            continue
        (option,) = options[field.name].annotation.__metadata__
        shown = option.show_default
        assert shown == str(field.default) or float(shown) == field.default
    (option,) = options["modules"].annotation.__metadata__
    assert tuple(option.show_default.split(", ")) == Recipe().modules
    result = qguard("repair", "--help")
    assert result.code == 0
    assert "--anchor" in result.out


def test_interrupted(qguard: Callable[..., Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how to go on."""

    def interrupt(_self: Any, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "on_step_end", interrupt)
    options = ["--data", models / "text.txt", *FAST, "--checkpoint-every"]
    result = qguard("repair", models / "damaged", tmp_path / "out", *options, 2)
    assert (result.code, result.out) == (130, "")
    first, second = result.err.splitlines()
    assert first == "qguard: the checkpoint of step 2 is kept; go on from it with --resume"
    assert second == "qguard: interrupted"
    result = qguard("repair", models / "damaged", tmp_path / "out", *options, 0, "--overwrite")
    assert (result.code, result.err) == (130, "qguard: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_print_while_they_are_imported_is_not_seen(models: Path, tmp_path: Path) -> None:
    code = "import sys; from optimum_qguard.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "repair", models / "damaged", tmp_path / "out", "--steps", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "qguard: steps is 0; it is at least 1\n"


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--strength", "-1"], "strength is -1; it is 0 or more"),
            (["--steps", "0"], "steps is 0; it is at least 1"),
            (["--block-size", "1000"], "block size is 1000, and the model reads 64 tokens"),
            (["--block-size", "60", "--data", "short.txt"], "has 5 tokens, and one block needs 60"),
            (["--data", "missing.txt"], "missing.txt: cannot be read as text"),
            (["--data", "nowhere"], "the data set nowhere cannot be loaded (and there is no such file or folder)"),
            (["--keep-at", "2,x"], "--keep-at is steps with commas between, not '2,x'"),
            (["--anchor", "./nowhere"], "nowhere: no such folder or file"),
            (["--anchor", "other"], "proj"),
            (["--modules", "nothing"], "nothing"),
            (["--patience", "2"], "--patience means nothing without --validation; give both, or leave it out"),
            (["--evaluate-every", "2"], "--evaluate-every means nothing without --validation"),
            (["--strength", "5000"], "strength 5000 times the learning rate is 5: more than 1 goes beyond the anchor"),
            (["--learning-rate", "1e18", "--warmup-steps", "0", "--strength", "0"], "step 2: the loss is nan; nothing"),
        ],
    )
    def test_options(
        self,
        options: list[str],
        says: str,
        refused: Callable[..., str],
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "short.txt").write_text("w2 w3 w4 w5 w6")
        save_clean("llama", tmp_path / "other", intermediate_size=64)
        given = {"--data": models / "text.txt", "--anchor": models / "clean"}
        defaults = [part for name, value in given.items() if name not in options for part in (name, value)]
        assert says in refused("repair", models / "damaged", tmp_path / "out", *FAST, *defaults, *options)

    @pytest.mark.parametrize("options", [["--strength", 9], ["--coupled"], ["--modules", "q_proj"]])
    def test_how_to_hold_and_no_anchor(
        self, options: list[object], refused: Callable[..., str], models: Path, tmp_path: Path
    ) -> None:
        line = refused("repair", models / "damaged", tmp_path / "out", "--data", models / "text.txt", *FAST, *options)
        assert f"{options[0]} means nothing without --anchor; give both" in line

    def test_no_tokenizer(self, refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
        shutil.copytree(models / "damaged", tmp_path / "in", ignore=shutil.ignore_patterns("token*"))
        line = refused("repair", tmp_path / "in", tmp_path / "out", "--data", models / "text.txt", *FAST)
        assert "has no tokenizer" in line

    def test_quantized(self, refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
        shutil.copytree(models / "damaged", tmp_path / "in")
        config = json.loads((tmp_path / "in" / "config.json").read_text())
        (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
        line = refused("repair", tmp_path / "in", tmp_path / "out", "--data", models / "text.txt", *FAST)
        assert "is quantized already" in line

    def test_an_output_that_is_taken(self, refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
        shutil.copytree(models / "clean", tmp_path / "out")
        assert "is not empty" in refused("repair", models / "damaged", tmp_path / "out", *FAST)
