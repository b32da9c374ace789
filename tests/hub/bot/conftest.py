"""Bots and Hubs for the tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bot_process import BotProcess
from hub_server import HubServer


@pytest.fixture(scope="module")
def module_hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


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
