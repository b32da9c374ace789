"""A flood of events, and the bot killed in the middle of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bot_process import BotProcess, checkpoint, event, is_alive
from hub_server import Discussion, HubServer, Repository

REPOSITORIES = 50
EVENTS = 1000
WORKERS = 2
KILLED_AT = 20


@pytest.mark.slow
def test_every_commit_is_scanned_and_posted_once_though_the_bot_is_killed(
    hub_server: HubServer, run_bot: Callable[..., BotProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"org/model-{index}" for index in range(REPOSITORIES)]
    bodies = [event(name, hub_server.add_repository(name, checkpoint(index))) for index, name in enumerate(names)]
    flood = bodies * (EVENTS // REPOSITORIES)
    random.Random(0).shuffle(flood)
    bot = run_bot("--workers", str(WORKERS))
    children: list[int] = []
    discuss = Repository.discuss

    def post_and_kill(*arguments: Any, **options: Any) -> Discussion:
        """The worst moment: it is posted, and the bot does not hear of it any more."""
        made = discuss(*arguments, **options)
        if sum(len(repository.discussions) for repository in hub_server.store.repositories.values()) == KILLED_AT:
            children.extend(bot.children())
            bot.kill()
        return made

    monkeypatch.setattr(Repository, "discuss", post_and_kill)

    def send(body: bytes) -> str:
        try:
            return bot.post(body)[1]["status"]
        except OSError:
            return "no answer"

    with ThreadPoolExecutor(16) as senders:
        outcomes = Counter(senders.map(send, flood))
    bot.process.wait(60)
    bot.wait(lambda: not any(map(is_alive, children)))

    bot = run_bot("--workers", str(WORKERS))
    with ThreadPoolExecutor(16) as senders:  # the Hub's owner has it send again what had no answer
        again = Counter(senders.map(send, bodies))
    assert again["duplicate"] >= outcomes["accepted"]
    assert again["duplicate"] + again["accepted"] == REPOSITORIES
    bot.wait(lambda: bot.idle)
    assert (bot.health["done"], bot.health["failed"]) == (REPOSITORIES, 0)
    assert [len(hub_server.repository(name).discussions) for name in names] == [1] * REPOSITORIES
    # A scan lists the files once. Only one that was cut short is begun again.
    scans = Counter(request.path for request in hub_server.requests if "/tree/" in request.path)
    assert len(scans) == REPOSITORIES
    assert scans.total() < REPOSITORIES + WORKERS
