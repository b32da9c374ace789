"""What all verbs have in common."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard import __version__, cli


def test_version(qguard: Callable[..., Any]) -> None:
    result = qguard("--version")
    assert (result.code, result.out) == (0, f"qguard {__version__}\n")


def test_help_lists_every_verb(qguard: Callable[..., Any]) -> None:
    result = qguard("--help")
    assert result.code == 0
    assert {"guard", "calibrate", "demo"} <= set(cli.verbs())
    assert all(verb in result.out for verb in cli.verbs())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["guard", "--help"], ["guard"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from optimum_qguard.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-verb"], "No such command 'no-such-verb'"),
        (["guard", "--no-such-option"], "No such option"),
        (["guard", "model"], "Missing"),
        (["guard", "model", "out", "--format", "nf4", "--multiplier", "two"], "--multiplier"),
    ],
)
def test_a_usage_error_is_one_line_and_64(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    line = refused(*arguments, code=64)
    assert message in line
    assert "--help" in line


def test_a_traceback_only_with_debug(qguard: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["calibrate", tmp_path / "missing", "--format", "nf4"]
    assert "Traceback" not in qguard(*arguments).err
    result = qguard(*arguments, "--debug")
    assert result.code == 2
    assert "Traceback" in result.err


def test_what_nobody_foresaw_is_one_line_too(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("def command() -> None:\n    raise KeyError('two\\nlines')\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert "KeyError: 'two\\nlines'" in refused("broken")


def test_a_new_verb_is_a_new_file(qguard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text('def command(name: str) -> None:\n    """Greet."""\n    print("hello", name)\n')
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert "Greet." in qguard("--help").out
    assert qguard("hello", "you").out == "hello you\n"


def test_interrupted(qguard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text("def command() -> None:\n    raise KeyboardInterrupt\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    result = qguard("waiting")
    assert (result.code, result.out, result.err) == (130, "", "qguard: interrupted\n")
