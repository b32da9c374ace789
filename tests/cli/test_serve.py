"""What keeps ``qguard serve`` from starting, in one line each. What it does is in tests/hub/bot."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECRET = "correct horse battery staple"
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QGUARD_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.chdir(tmp_path)


def test_no_secret(refused: Refused) -> None:
    line = refused("serve", "--dry-run")
    assert line.startswith("qguard: a webhook secret is needed: set QGUARD_WEBHOOK_SECRET or give --secret-file")


def test_a_secret_that_can_be_guessed(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("1234\n")
    line = refused("serve", "--dry-run", "--secret-file", tmp_path / "secret")
    assert "fewer than 16 characters" in line
    assert "1234" not in line


def test_a_secret_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    assert "cannot be read from it" in refused("serve", "--secret-file", tmp_path / "missing")


def test_no_token(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGUARD_WEBHOOK_SECRET", SECRET)
    line = refused("serve")
    assert line == "qguard: a token that may write is needed to post reports: set HF_TOKEN, or give --dry-run\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--write", "blog"], "--write is discussion or card, not 'blog'"),
        (["--port", "70000"], "--port is between 0 and 65535, not 70000"),
        (["--workers", "0"], "--workers must be positive, not 0"),
        (["--time-limit", "0"], "--time-limit must be positive, not 0.0"),
    ],
)
def test_options_that_make_no_sense(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setenv("QGUARD_WEBHOOK_SECRET", SECRET)
    assert words in refused("serve", "--dry-run", *options)


@pytest.mark.parametrize("option", ["--time-limit", "--memory-limit", "--retry-delay"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_what_is_no_limit(qguard: Callable[..., Any], option: str, value: str) -> None:
    """No scan would ever take longer than NaN seconds."""
    result = qguard("serve", "--dry-run", option, value)
    assert result.code == 64
    assert f"{option} is a number from 0 on, not {value}" in result.err


@pytest.mark.parametrize("missing", ["gradio", "prometheus_client"])
def test_without_the_extra(refused: Refused, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("QGUARD_WEBHOOK_SECRET", SECRET)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused("serve", "--dry-run")
    assert line == f"qguard: the bot needs {missing}: pip install 'optimum-qguard[bot]'\n"


def test_a_port_that_is_taken(qguard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QGUARD_WEBHOOK_SECRET", SECRET)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = qguard("serve", "--dry-run", "--port", port, "--queue", tmp_path / "queue.sqlite")
    assert result.code == 2
    assert result.err.endswith(
        f"qguard: 127.0.0.1:{port} cannot be listened on, probably because it is taken; give another --port\n"
    )


def test_a_queue_that_cannot_be_written(qguard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGUARD_WEBHOOK_SECRET", SECRET)
    Path("file").write_text("")
    result = qguard("serve", "--dry-run", "--queue", "file/queue.sqlite")
    assert result.code == 2
    assert result.err == "qguard: file/queue.sqlite: the queue cannot be written here (File exists)\n"
