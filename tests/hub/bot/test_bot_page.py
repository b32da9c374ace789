"""The page in a real browser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from bot_process import BotProcess, checkpoint
from hub_server import HubServer

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def page(browser: Any, bot: BotProcess) -> Iterator[Any]:
    """The bot's page; nothing may be fetched from elsewhere, and nothing may go wrong in it."""
    context = browser.new_context(viewport={"width": 1100, "height": 1200})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(bot.url)
    yield opened
    context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((bot.url, "data:", "blob:", "about:"))] == []


def scan(page: Any, model: str) -> None:
    page.get_by_label("Model").fill(model)
    page.get_by_role("button", name="Scan").click()


def test_scan_by_hand(bots_hub: HubServer, bot: BotProcess, page: Any) -> None:
    commit = bots_hub.add_repository("org/public", checkpoint())
    scan(page, "org/public")
    page.locator(".verdict").wait_for()
    assert "Clean" in page.locator(".verdict").inner_text()
    report = page.frame_locator("iframe.report")
    report.get_by_text(commit).first.wait_for()
    assert page.frames[1].evaluate("innerWidth") > 800
    assert bots_hub.repository("org/public").discussions == []


def test_what_strangers_may_not_see(bots_hub: HubServer, page: Any) -> None:
    bots_hub.add_repository("org/private", checkpoint(), private=True)
    scan(page, "org/private")
    page.get_by_text("There is no public model org/private on the Hub.").wait_for()
    assert page.locator(".verdict").count() == 0


def test_other_words_are_refused_in_one_line(bot: BotProcess, page: Any) -> None:
    for model in ("/etc", "../x/y", HOSTILE, ""):
        scan(page, model)
        page.get_by_role("alert").get_by_text("That is no model on the Hub").wait_for()


def test_hostile_names_are_inert(bots_hub: HubServer, page: Any) -> None:
    files = checkpoint() | {f"{HOSTILE}.safetensors": b"no header"}
    bots_hub.add_repository("org/hostile", files)
    scan(page, "org/hostile")
    page.get_by_label("Full: every weight").check()
    page.locator(".verdict.suspicious").wait_for()
    assert "onerror" in page.locator(".verdict").inner_text()


def test_it_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    scan(page, "org/public")
    page.locator(".verdict").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_can_be_uploaded(bot: BotProcess) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        + b"x" * 1000
        + b"\r\n--b--\r\n"
    )
    request = urllib.request.Request(
        f"{bot.url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert bot.request(request)[0] == 413
