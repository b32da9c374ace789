"""``qguard push``, here and in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from repair_models import save_clean, save_damaged, words

from optimum_qguard import Key, encrypt_checkpoint, repair_checkpoint


@pytest.fixture
def encrypted(tiny_llama: Path, tmp_path: Path) -> Path:
    encrypt_checkpoint(tiny_llama, tmp_path / "out", key=Key.generate())
    return tmp_path / "out"


def test_in_words_and_as_json(hub: HubServer, qguard: Callable[..., Any], encrypted: Path) -> None:
    (encrypted / "model.key").write_text("x")
    result = qguard("push", encrypted, "org/model", "--private", "--commit-message", "Mine")
    assert (result.code, result.err) == (0, "")
    commit = hub.head("org/model")
    assert f"files in org/model: {hub.url}/org/model/commit/{commit}\n" in result.out
    assert "Not uploaded: model.key\n" in result.out
    assert hub.repository("org/model").private
    assert hub.repository("org/model").commits[commit].title == "Mine"
    (encrypted / "more.txt").write_text("x")
    found = qguard("push", encrypted, "org/model", "--create-pr", "--json").json
    assert (found["pull_request"], found["url"]) == (1, f"{hub.url}/org/model/discussions/1")
    assert "more.txt" in found["files"]
    assert "more.txt" not in hub.files("org/model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["others/model"], "your token may not do that"),
        (["org/a/b"], "give one as org/name"),
        (["org/model", "--create-pr", "--revision", "x"], "not both"),
        (["org/model", "--collapse", "/nowhere.json"], "cannot be read"),
    ],
)
def test_errors_are_one_line(
    hub: HubServer, qguard: Callable[..., Any], encrypted: Path, arguments: list[str], message: str
) -> None:
    result = qguard("push", encrypted, *arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("qguard: ")
    assert result.err.count("\n") == 1
    assert message in result.err


def test_a_repaired_model(hub: HubServer, qguard: Callable[..., Any], tmp_path: Path) -> None:
    """Where it came from is not told if that was a folder; a repair.json that is damaged is one line."""
    clean = save_clean("llama", tmp_path / "clean")
    damaged = save_damaged(clean, tmp_path / "damaged")
    options: dict[str, Any] = {"text": words(200), "steps": 1, "block_size": 32, "device": "cpu"}
    repair_checkpoint(damaged, tmp_path / "out", anchor=clean, checkpoint_every=0, **options)
    result = qguard("push", tmp_path / "out", "org/repaired")
    assert (result.code, result.err) == (0, "")
    card = hub.files("org/repaired")["README.md"].decode()
    assert "## Repaired" in card
    assert str(tmp_path) not in card
    for content in ("{", "[]", '{"schema_version": 1}'):
        (tmp_path / "out" / "repair.json").write_text(content)
        result = qguard("push", tmp_path / "out", "org/repaired")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "repair.json: " in result.err
        assert "write" in result.err
    (tmp_path / "out" / "repair.json").unlink()
    assert "has no qguard.json or repair.json" in qguard("push", tmp_path / "out", "org/repaired").err


_IN_ONE_PROCESS = """
import os, sys
from pathlib import Path
from optimum_qguard.cli import main
folder = Path(sys.argv[1])
encrypt = ["encrypt", "org/plain@main", str(folder / "out"), "--key", str(folder / "k"), "--new-key"]
token = os.environ.pop("HF_TOKEN")
assert main(encrypt) == 2
os.environ["HF_TOKEN"] = token
assert main(encrypt) == 0
sys.exit(main(["push", str(folder / "out"), "org/protected", "--json"]))
"""


def test_a_process_of_its_own(hub_server: HubServer, tiny_llama: Path, tmp_path: Path) -> None:
    """Encrypts ``org/name@revision`` from the Hub, and pushes what came of it."""
    hub_server.add_repository("org/plain", tiny_llama, private=True)
    hub_server.fail("GET /cdn/", cut_after=100_000)
    command = [sys.executable, "-c", _IN_ONE_PROCESS, str(tmp_path)]
    done = subprocess.run(command, env=hub_server.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("qguard: org/plain@main: ")
    assert "set HF_TOKEN to a token with access" in done.stderr
    assert json.loads(done.stdout[done.stdout.index("\n{") :])["commit"] == hub_server.head("org/protected")
    assert b"base_model: org/plain\n" in hub_server.files("org/protected")["README.md"]
