"""Bots and Hubs for the tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bot_process import BotProcess
from hub_server import HubServer


@pytest.fixture(scope="session")
def bots_hub() -> Iterator[HubServer]:
    """The Hub of `bot`."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def bot(bots_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BotProcess]:
    """One for many tests, because importing Gradio and torch takes it seconds."""
    process = BotProcess(bots_hub, tmp_path_factory.mktemp("bot"), "--attempts", "2")
    yield process
    assert process.end() == 0


@pytest.fixture
def run_bot(hub_server: HubServer, tmp_path: Path) -> Iterator[Callable[..., BotProcess]]:
    """Starts a bot with options; killed after the test if it is still there."""
    started: list[BotProcess] = []

    def run(*options: str, **settings: Any) -> BotProcess:
        started.append(BotProcess(hub_server, tmp_path, *options, **settings))
        return started[-1]

    yield run
    for bot in started:
        bot.kill()
