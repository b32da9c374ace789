"""The examples run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repair_models import save_clean

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object, folder: Path | None = None) -> str:
    return python(str(EXAMPLES / name), *arguments, folder=folder)


def qguard(*arguments: object, folder: Path | None = None) -> str:
    return python("-c", "import sys; from optimum_qguard.cli import main; sys.exit(main())", *arguments, folder=folder)


def python(*arguments: object, folder: Path | None) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def test_load_guarded(tiny_llama: Path) -> None:
    out = run("load_guarded.py", tiny_llama)
    assert "14 tensors" in out
    assert "guarded by unbiased stochastic rounding" in out
    assert "loaded again: bitsandbytes" in out


@pytest.mark.real_model
def test_load_guarded_with_the_real_model() -> None:
    assert "210 tensors" in run("load_guarded.py")


def test_publish_protected(tiny_llama: Path) -> None:
    out = run("publish_protected.py", tiny_llama)
    assert "18 tensors rewritten" in out
    assert "same outputs: True" in out
    assert "quantized with the key: bitsandbytes" in out
    assert "back, byte for byte" in out


def test_scan_model(tiny_llama: Path, tmp_path: Path) -> None:
    out = run("scan_model.py", tiny_llama, folder=tmp_path)
    assert f"{tiny_llama}: clean (no detector found anything)" in out
    assert (tmp_path / "scan.html").read_text().startswith("<!DOCTYPE html>")


def test_github_action(tiny_llama: Path, tmp_path: Path) -> None:
    """Its command runs, and what is uploaded is what the command writes."""
    steps = yaml.safe_load((EXAMPLES / "github-action-scan.yml").read_text())["jobs"]["scan"]["steps"]
    (command,) = (step["run"] for step in steps if step.get("run", "").startswith("qguard scan model "))
    (upload,) = (step for step in steps if "upload-sarif" in step.get("uses", ""))
    arguments = command.replace("scan model ", f"scan {tiny_llama} ").split()[1:]
    assert qguard(*arguments, folder=tmp_path) == f"clean: {tiny_llama}\n"
    written = json.loads((tmp_path / upload["with"]["sarif_file"]).read_text())
    assert written["version"] == "2.1.0"


def test_pre_commit(tiny_llama: Path, tmp_path: Path) -> None:
    """pre-commit takes the hook and its configuration; the hook's command runs on a file."""
    clientlib = pytest.importorskip("pre_commit.clientlib")
    (hook,) = clientlib.load_manifest(str(EXAMPLES.parent / ".pre-commit-hooks.yaml"))
    (source,) = clientlib.load_config(str(EXAMPLES / "pre-commit-config.yaml"))["repos"]
    (wanted,) = source["hooks"]
    assert wanted["id"] == hook["id"]
    file = tiny_llama / "model.safetensors"
    assert re.search(hook["files"], str(file))
    program, *verb = hook["entry"].split()
    assert program == "qguard"
    assert qguard(*verb, *wanted["args"], file).startswith(f"CLEAN         {file}")


def test_repair_model(tmp_path: Path) -> None:
    clean = save_clean("llama", tmp_path / "clean", max_position_embeddings=128)
    out = run("repair_model.py", clean)
    assert out.startswith("10 steps of 256 tokens: training loss ")
    before, after = re.search(r"distance to the anchor (\S+) → (\S+)\n", out).groups()
    assert float(after) < 0.7 * float(before)


@pytest.mark.real_model
def test_guard_in_place() -> None:
    out = run("guard_in_place.py")
    assert "210 tensors" in out
    assert "The capital of Japan is" in out
