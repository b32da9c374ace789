"""``optimum-cli qguard`` is ``qguard``."""

import subprocess
import sys

import pytest

OPTIMUM_CLI = [sys.executable, "-m", "optimum.commands.optimum_cli"]
QGUARD = [sys.executable, "-c", "import sys; from optimum_qguard.cli import main; sys.exit(main(sys.argv[1:]))"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_optimum_cli_lists_qguard() -> None:
    assert "qguard" in run([*OPTIMUM_CLI, "--help"]).stdout


@pytest.mark.parametrize("arguments", [["guard", "--help"], ["--no-such-option"]])
def test_arguments_reach_qguard_untouched(arguments: list[str]) -> None:
    ours, theirs = run([*QGUARD, *arguments]), run([*OPTIMUM_CLI, "qguard", *arguments])
    assert theirs.returncode == ours.returncode
    assert ours.stdout in theirs.stdout
    assert ours.stderr in theirs.stderr
