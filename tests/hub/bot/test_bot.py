"""The whole bot over HTTP: webhooks in, reports on the Hub out."""

from __future__ import annotations

import contextlib
import json
import struct
import urllib.request
from pathlib import Path

import pytest
from bot_process import SECRET, BotProcess, checkpoint, event
from hub_server import HubServer
from huggingface_hub import HfApi


def test_only_who_knows_the_secret_is_listened_to(bot: BotProcess) -> None:
    before = bot.metric('qguard_bot_webhook_requests_total{outcome="unauthorized"}')
    assert bot.post(b"not even JSON", secret=None)[0] == 401
    for wrong in ("wrong", SECRET[:-1], SECRET + "x", SECRET.upper(), "é" * 20):
        assert bot.post(b"not even JSON", secret=wrong)[0] == 403
    assert bot.post(b"x" * 50_000, secret="wrong")[0] == 403
    assert bot.metric('qguard_bot_webhook_requests_total{outcome="unauthorized"}') == before + 7


def test_what_is_no_event_is_refused(bot: BotProcess) -> None:
    assert bot.post(b"not JSON")[0] == 400
    status, answer = bot.post(event("org/model", "main"))
    assert (status, answer["status"]) == (400, "malformed")
    assert bot.post(b" " * ((1 << 20) + 1))[0] == 413
    status, answer = bot.post(event("org/model", "0" * 40).replace(b'"model"', b'"dataset"'))
    assert (status, answer["status"]) == (200, "ignored")


def test_a_commit_on_the_hub_is_scanned_and_the_report_posted_once(
    bots_hub: HubServer, bot: BotProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bots_hub.use_here(monkeypatch, tmp_path)
    bots_hub.add_repository("org/watched", checkpoint())
    hook = HfApi().create_webhook(
        url=f"{bot.url}/webhooks/scan", watched=[{"type": "user", "name": "org"}], domains=["repo"], secret=SECRET
    )
    commit = HfApi().upload_file(repo_id="org/watched", path_or_fileobj=b"{}", path_in_repo="generation_config.json")
    discussions = bots_hub.repository("org/watched").discussions
    bot.wait(lambda: discussions)
    bot.wait(lambda: bot.idle)
    HfApi().delete_webhook(hook.id)
    for _ in range(3):
        status, answer = bot.post(event("org/watched", commit.oid))
        assert (status, answer["status"]) == (200, "duplicate")
    (discussion,) = discussions
    assert discussion.author == "alice"
    assert discussion.title.startswith(f"QGuard scan of {commit.oid[:8]}: ")
    assert f"qguard scan org/watched@{commit.oid}" in discussion.comments[0]
    assert f"org/watched@{commit.oid}: " in bot.log


def test_a_broken_repository_is_reported_as_such(bots_hub: HubServer, bot: BotProcess) -> None:
    lie = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    files = {"model.safetensors": struct.pack("<Q", len(lie)) + lie}
    commit = bots_hub.add_repository("org/liar", files)
    assert bot.post(event("org/liar", commit))[0] == 202
    bot.wait(lambda: bot.idle)
    (discussion,) = bots_hub.repository("org/liar").discussions
    assert discussion.title == f"QGuard scan of {commit[:8]}: suspicious"


def test_a_repository_that_is_gone_is_tried_again_and_given_up(bot: BotProcess) -> None:
    failed = bot.health["failed"]
    assert bot.post(event("org/gone", "1" * 40))[0] == 202
    bot.wait(lambda: bot.health["failed"] == failed + 1)
    assert "org/gone@" + "1" * 40 + ": scan failed (" in bot.log
    assert "; given up" in bot.log


def test_posting_is_tried_again_without_another_scan(bots_hub: HubServer, bot: BotProcess) -> None:
    commit = bots_hub.add_repository("org/later", checkpoint())
    bots_hub.fail("POST /api/models/org/later/discussions", status=500, times=1)
    scans = bot.metric("qguard_bot_scan_seconds_count")
    bot.post(event("org/later", commit))
    bot.wait(lambda: bots_hub.repository("org/later").discussions)
    bot.wait(lambda: bot.idle)
    assert bot.metric("qguard_bot_scan_seconds_count") == scans + 1
    assert bot.metric('qguard_bot_failures_total{step="post"}') == 1


def test_no_address_takes_large_bodies(bot: BotProcess) -> None:
    body = json.dumps({"data": ["x" * (8 << 20)], "fn_index": 0, "session_hash": "x"}).encode()
    for path in ("queue/join", "run/scan", "reset"):
        request = urllib.request.Request(f"{bot.url}/gradio_api/{path}", body, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError):  # it hung up
            assert bot.request(request)[0] >= 400
    assert bot.answers


def test_health_and_metrics(bots_hub: HubServer, bot: BotProcess) -> None:
    bot.post(event("org/measured", bots_hub.add_repository("org/measured", {"model.safetensors": b"broken"})))
    bot.wait(lambda: bot.idle)
    status, text = bot.get("/health")
    health = json.loads(text)
    assert (status, health["status"], health["workers"], health["workers_alive"]) == (200, "ok", 1, 1)
    assert bot.metric('qguard_bot_jobs{state="done"}') == health["done"] > 0
    assert bot.metric('qguard_bot_verdicts_total{verdict="suspicious"}') >= 1
    assert bot.metric('qguard_bot_webhook_requests_total{outcome="accepted"}') >= 1
    assert SECRET not in text + bot.get("/metrics")[1] + bot.log
