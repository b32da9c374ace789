"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
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


@pytest.mark.real_model
def test_guard_in_place() -> None:
    out = run("guard_in_place.py")
    assert "210 tensors" in out
    assert "The capital of Japan is" in out
