"""What the bot writes."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from optimum_qguard.hub.bot import message
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import Coverage, DetectorRun, ScanReport

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    "</td><script>alert(1)</script>|x| [a](https://evil.example) ![i](http://evil.example/i.png) @everyone "
    "<!-- qguard-bot:f --> https://evil.example www.evil.example `code` **bold** \u202e\x1b[31m\n# Heading"
)


def report(verdict: str = "suspicious", *findings: Finding, **changes: object) -> ScanReport:
    values = {
        "model": "org/model",
        "revision": COMMIT,
        "verdict": verdict,
        "reason": "Three tensors have spikes.",
        "coverage": Coverage(
            tensors=3, tensors_scanned=3, weights=1000, weights_scanned=10, bytes=2000, bytes_read=2_500_000
        ),
        "detectors": [DetectorRun(name="integrity", state="ran"), DetectorRun(name="gap", state="not run", reason="x")],
        "findings": list(findings),
    }
    return ScanReport.model_validate(values | changes)


def test_says_what_was_found_and_how_to_repeat_it() -> None:
    finding = Finding(detector="spikes", severity="error", message="Too many weights there.", tensor="a.weight")
    text = message.discussion(report("suspicious", finding))
    assert text.startswith("**Verdict: suspicious.** ")
    assert "| error | spikes `a.weight` | Too many weights there. |" in text
    assert "3 of 3 tensors and 1.0% of the weights were looked at (a random sample), 2.5 MB read" in text
    assert "Detectors: integrity, gap (not run)." in text
    assert f"qguard scan org/model@{COMMIT}\n" in text
    assert text.endswith(f"<!-- qguard-bot:{COMMIT} -->")
    assert message.title(report()) == "QGuard scan of 01234567: suspicious"
    assert message.is_title(message.title(report()), COMMIT)
    assert not message.is_title(message.title(report()), "f" * 40)


def test_it_stays_short() -> None:
    findings = [Finding(detector="d", severity="note", message="m" * 5000) for _ in range(500)]
    text = message.discussion(report("suspicious", *findings))
    assert "and 480 more." in text
    assert len(text) < 20_000


def test_skipped_is_never_called_clean() -> None:
    assert "that does not mean that it is clean" in message.discussion(report("skipped"))


@pytest.mark.parametrize("place", ["tensor", "file", "message", "reason"])
def test_names_from_the_repository_are_inert(place: str) -> None:
    finding = Finding.model_validate(
        {"detector": "d", "severity": "error", "message": "m", **({place: HOSTILE} if place != "reason" else {})}
    )
    found = report("suspicious", finding, **({"reason": HOSTILE} if place == "reason" else {}))
    for text in (message.discussion(found), message.card_section(found, "0" * 64)):
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert "<script" not in page
        assert "<a " not in page
        assert "<img" not in page
        assert page.count("<tr>") == 2
        assert page.count("<h1>") == 0
        assert "\x1b" not in text
        assert "\u202e" not in text
        visible = re.sub(r"<code>.*?</code>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
        assert not re.search(r"https?://|www\.|@", visible)
        assert len(re.findall(r"^<!-- qguard-", text, flags=re.MULTILINE)) == 1


def test_a_card_says_for_which_files() -> None:
    section = message.card_section(report("clean"), "a" * 64)
    assert message.content_marker("a" * 64, "clean") in section
