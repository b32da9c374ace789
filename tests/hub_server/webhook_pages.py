"""Webhooks of a user."""

from __future__ import annotations

import contextlib
import json

from hub_server.pages import Pages, route


class WebhookPages(Pages):
    @route("GET", "/api/settings/webhooks")
    def list_webhooks(self) -> None:
        self._signed_in()
        self._json(self.hub.store.webhooks)

    @route("POST", "/api/settings/webhooks")
    def create_webhook(self) -> None:
        self._signed_in()
        wanted = json.loads(self.body)
        hook = {"id": f"hook{len(self.hub.store.webhooks)}", "disabled": False, "secret": None, "domains": []} | wanted
        self.hub.store.webhooks.append(hook)
        self._json({"webhook": hook})

    @route("DELETE", "/api/settings/webhooks/(?P<hook>[^/]+)")
    def delete_webhook(self, hook: str) -> None:
        self._signed_in()
        with contextlib.suppress(StopIteration):
            self.hub.store.webhooks.remove(next(found for found in self.hub.store.webhooks if found["id"] == hook))
        self._json({})
