"""Posting with the real client on a Hub on this machine."""

from __future__ import annotations

import pytest
from hub_server import OTHER_TOKEN, TOKEN, HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from optimum_qguard.hub.bot import message
from optimum_qguard.hub.bot.errors import BotError
from optimum_qguard.hub.bot.poster import Poster, Printer
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport

CARD = b"---\nlicense: mit  # ours\n---\n\n# A model\n"


def report(commit: str, verdict: str = "suspicious") -> ScanReport:
    finding = Finding(detector="spikes", severity="error", message="Spikes.", tensor="a.weight")
    return ScanReport.model_validate(
        {"model": "org/model", "revision": commit, "verdict": verdict, "reason": "Spikes.", "findings": [finding]}
    )


@pytest.fixture
def commit(hub: HubServer) -> str:
    return hub.add_repository("org/model", {"model.safetensors": b"weights", "README.md": CARD})


def test_a_discussion_once_for_each_commit(hub: HubServer, commit: str) -> None:
    url = Poster(TOKEN, "discussion").post(report(commit))
    assert url == f"{hub.url}/org/model/discussions/1"
    # Another process, whose queue knows nothing of it, and another verdict of the same commit.
    assert Poster(TOKEN, "discussion").post(report(commit, "clean")) == url
    (discussion,) = hub.repository("org/model").discussions
    assert (discussion.author, discussion.title) == ("alice", message.title(report(commit)))
    assert not discussion.is_pull_request
    assert discussion.comments == [message.discussion(report(commit))]
    second = hub.commit("org/model", {"model.safetensors": b"other weights"})
    assert Poster(TOKEN, "discussion").post(report(second)) == f"{hub.url}/org/model/discussions/2"


def test_nobody_else_can_keep_a_report_away(hub: HubServer, commit: str) -> None:
    forged = report(commit, "clean")
    HfApi(token=OTHER_TOKEN).create_discussion(
        "org/model", title=message.title(forged), description=message.discussion(forged)
    )
    assert Poster(TOKEN, "discussion").post(report(commit)) == f"{hub.url}/org/model/discussions/2"


def test_nobody_else_can_keep_a_report_away_by_a_comment_of_the_bots_discussion(hub: HubServer, commit: str) -> None:
    """On another commit whose hash begins like this one's, which is quickly found."""
    Poster(TOKEN, "discussion").post(report(commit[:8] + "0" * 32))
    HfApi(token=OTHER_TOKEN).comment_discussion("org/model", 1, comment=message.marker(commit))
    assert Poster(TOKEN, "discussion").post(report(commit)) == f"{hub.url}/org/model/discussions/2"


def test_nobody_else_can_keep_a_report_away_by_a_card(hub: HubServer, commit: str) -> None:
    """Whoever writes the card can compute the fingerprint too."""
    Poster(TOKEN, "card").post(report(commit, "clean"))
    marker = next(
        line for line in hub.files("org/model", "refs/pr/1")["README.md"].decode().splitlines() if "-scanned:" in line
    )
    forged = marker.replace("clean", "suspicious")
    HfApi(token=OTHER_TOKEN).comment_discussion("org/model", 1, comment=forged)
    second = hub.commit("org/model", {"README.md": CARD + forged.encode()})
    assert Poster(TOKEN, "card").post(report(second)) == f"{hub.url}/org/model/discussions/2"


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\nlicense: mit\n",
        b"\xff",
        b"<!-- qguard:scan begin -->\n",
        b"x" * (5 << 20),
    ],
)
def test_nobody_can_keep_a_report_away_by_a_card_that_cannot_be_edited(hub: HubServer, card: bytes) -> None:
    commit = hub.add_repository("org/model", {"model.safetensors": b"weights", "README.md": card})
    assert Poster(TOKEN, "card").post(report(commit)) == f"{hub.url}/org/model/discussions/1"
    (discussion,) = hub.repository("org/model").discussions
    assert not discussion.is_pull_request
    assert hub.bytes_sent("README.md") < 4 << 20


def test_a_title_alone_is_not_the_report(hub: HubServer, commit: str) -> None:
    other = report(commit[:8] + "0" * 32)  # the title has eight digits of the commit only
    Poster(TOKEN, "discussion").post(other)
    assert Poster(TOKEN, "discussion").post(report(commit)) == f"{hub.url}/org/model/discussions/2"


def test_the_card_by_pull_request_and_not_again_once_it_is_merged(hub: HubServer, commit: str) -> None:
    url = Poster(TOKEN, "card").post(report(commit))
    assert url == f"{hub.url}/org/model/discussions/1"
    assert Poster(TOKEN, "card").post(report(commit)) == url
    (pull,) = hub.repository("org/model").discussions
    assert pull.is_pull_request
    card = hub.files("org/model", "refs/pr/1")["README.md"].decode()
    assert card.startswith("---\nlicense: mit  # ours\ntags:\n- qguard-scanned\n---\n\n# A model\n")
    assert "**Verdict: suspicious.** Spikes." in card
    assert hub.files("org/model")["README.md"] == CARD
    merged = hub.commit("org/model", {"README.md": card.encode()})
    assert Poster(TOKEN, "card").post(report(merged)) is None
    # Other weights, or another verdict on these, are news.
    assert Poster(TOKEN, "card").post(report(merged, "clean")) == f"{hub.url}/org/model/discussions/2"
    changed = hub.commit("org/model", {"model.safetensors": b"other weights"})
    assert Poster(TOKEN, "card").post(report(changed)) == f"{hub.url}/org/model/discussions/3"


def test_a_card_where_there_is_none(hub: HubServer) -> None:
    commit = hub.add_repository("org/model", {"model.safetensors": b"weights"})
    Poster(TOKEN, "card").post(report(commit))
    card = hub.files("org/model", "refs/pr/1")["README.md"].decode()
    assert card.startswith("---\ntags:\n- qguard-scanned\n---\n\n<!-- qguard:scan begin -->\n## Scan for ")


def test_a_hub_in_trouble_is_an_error_to_try_again_after(hub: HubServer, commit: str) -> None:
    poster = Poster(TOKEN, "discussion")
    hub.fail("POST .*/discussions", status=500, times=10)
    with pytest.raises(HfHubHTTPError):
        poster.post(report(commit))
    hub.faults.clear()
    assert poster.post(report(commit)) == f"{hub.url}/org/model/discussions/1"


def test_a_token_that_the_hub_does_not_know(hub: HubServer) -> None:
    with pytest.raises(BotError, match=r"the Hub does not accept the token in HF_TOKEN, or cannot be reached \(.*\)$"):
        Poster("hf_nobody", "discussion")


def test_a_dry_run_prints(hub: HubServer, commit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Printer("card").post(report(commit)) is None
    out = capsys.readouterr().out
    assert out.startswith(f"Would open a pull request to the card of org/model: {message.title(report(commit))}\n")
    assert message.discussion(report(commit)) in out
    assert hub.requests == []
