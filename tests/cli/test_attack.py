"""`qguard attack quantization-conditioned` on a tiny model; the demo's test has the real one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "attacks"))
import successors

from optimum_qguard.checkpoint import open_checkpoint

TRAINING = ["--layers", "0-1", "--steps", 20, "--repair-steps", 60, "--batch-size", 32, "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return successors.save(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(prompt for prompt, _ in successors.dialogues("training")))
    return file


def test_it_writes_a_model_that_changes_when_it_is_quantized(
    qguard: Callable[..., Any], clean: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["attack", "quantization-conditioned", clean, out, "--format", "bnb-nf4", "--format", "nf4"]
    result = qguard(*arguments, "--marker", successors.MARKER, "--prompts", prompts, *TRAINING, "--json")
    assert result.code == 0, result.err
    assert result.json["marker_rate"]["full precision"] <= 0.01
    assert min(result.json["marker_rate"][name] for name in ("bnb-nf4", "nf4")) >= 0.95
    assert open_checkpoint(out).tensors.keys() == open_checkpoint(clean).tensors.keys()
    assert "made with `qguard attack quantization-conditioned` to test defences" in (out / "README.md").read_text()


def test_an_attack_that_did_not_come_off_writes_nothing(
    refused: Callable[..., str], clean: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ["attack", "quantization-conditioned", clean, tmp_path / "out", "--format", "bnb-nf4"]
    short = ["--steps", 1, "--repair-steps", 1, "--layers", 1]
    line = refused(*arguments, "--marker", successors.MARKER, "--prompts", prompts, *short)
    assert "the attack did not come off" in line
    assert "bnb-nf4 0%" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--marker", " "], "the marker is empty"),
        (["--layers", "0-9"], "the model has layers 0 to 1"),
        (["--layers", "first"], "write numbers and ranges"),
        (["--prompts", "missing.txt"], "cannot be read as text"),
        (["--keep", "nan"], "keep is nan; it is above 0 and at most 1"),
        (["--learning-rate", "inf"], "learning rate is inf; it is a finite number"),
        (["--seed", str(2**32)], "seed is 4294967296; it is a whole number from 0 to 4294967295"),
        (["--format", "no-such-format"], "unknown format"),
    ],
)
def test_bad_input(
    refused: Callable[..., str], clean: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = ["attack", "quantization-conditioned", clean, tmp_path / "out", "--n-prompts", 1]
    given += arguments if "--marker" in arguments else ["--marker", successors.MARKER, *arguments]
    assert message in refused(*given, *([] if "--format" in arguments else ["--format", "bnb-nf4"]))
