"""What is read out of a webhook request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_qguard.hub.bot.payload import Event, parse_event

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def payload(**changes: Any) -> bytes:
    """A request's body as the Hub sends it, with changes by ``section__key``."""
    content: dict[str, Any] = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {
            "type": "model",
            "name": "org/model",
            "id": "621ffdc036468d709f17434d",
            "private": False,
            "url": {"web": "https://huggingface.co/org/model", "api": "https://huggingface.co/api/models/org/model"},
            "owner": {"id": "628b753283ef59b5be89e937"},
            "headSha": COMMIT,
        },
        "webhook": {"id": "6390e855e30d9209411de93b", "version": 3},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": None, "newSha": COMMIT}],
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content[section][key] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize("action", ["create", "update"])
def test_content_of_models(action: str) -> None:
    event = parse_event(payload(event__action=action))
    assert event == Event(repository="org/model", commit=COMMIT)


@pytest.mark.parametrize(
    "changes",
    [
        {"event__action": "delete"},
        {"event__action": "move"},
        {"event__scope": "repo"},
        {"event__scope": "repo.config"},
        {"event__scope": "discussion"},
        {"event__scope": "discussion.comment"},
        {"repo__type": "dataset"},
        {"repo__type": "space"},
        {"repo__headSha": None},
    ],
)
def test_nothing_else(changes: dict[str, Any]) -> None:
    assert parse_event(payload(**changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"repo__headSha": "main"},
        {"repo__headSha": COMMIT.upper()},
        {"repo__headSha": COMMIT + "\n"},
        {"repo__name": "../../etc"},
        {"repo__name": "/etc/passwd"},
        {"repo__name": "org/model@main"},
        {"repo__name": "org/model\n"},
        {"repo__name": "a/b/c"},
        {"repo__name": "-x/y"},
        {"repo__name": "org/" + "x" * 100},
        {"repo__name": 7},
        {"repo__type": []},
    ],
)
def test_what_cannot_be_a_commit_or_a_repository(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[\w.]+: "):
        parse_event(payload(**changes))


json_texts = st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.text(), inner)).map(json.dumps)


@given(st.binary() | json_texts.map(str.encode))
def test_anything_else_is_one_line(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        parse_event(body)
