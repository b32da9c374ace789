"""Webhooks: what the Hub posts when a repository changes (body of version 3)."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_server import HubServer
    from hub_server.store import Repository


def webhook_body(
    hub: HubServer, repository: Repository, ref: str, old: str | None, new: str, hook_id: str = "hook"
) -> dict[str, Any]:
    """Of an update of a repository's content."""
    return {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {
            "type": "model",
            "name": repository.id,
            "id": repository.id,
            "private": repository.private,
            "url": {"web": f"{hub.url}/{repository.id}", "api": f"{hub.url}/api/models/{repository.id}"},
            "headSha": repository.refs.get("refs/heads/main"),
            "owner": {"id": repository.id.partition("/")[0]},
        },
        "webhook": {"id": hook_id, "version": 3},
        "updatedRefs": [{"ref": ref, "oldSha": old, "newSha": new}],
    }


def deliver(hub: HubServer, repository: Repository, ref: str, old: str | None, new: str) -> None:
    """Post to every webhook that watches the repository or its owner, in the background."""
    owner = repository.id.partition("/")[0]
    for hook in hub.store.webhooks:
        if any(watched["name"] in (owner, repository.id) for watched in hook["watched"]):
            body = json.dumps(webhook_body(hub, repository, ref, old, new, hook["id"])).encode()
            headers = {"Content-Type": "application/json"}
            if hook["secret"]:
                headers["X-Webhook-Secret"] = hook["secret"]
            request = urllib.request.Request(hook["url"], body, headers, method="POST")
            threading.Thread(target=_post, args=(request,), daemon=True).start()


def _post(request: urllib.request.Request) -> None:
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30):
        pass
