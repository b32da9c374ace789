"""All pages of the Hub together."""

from __future__ import annotations

from hub_server.discussion_pages import DiscussionPages
from hub_server.file_pages import FilePages
from hub_server.repository_pages import RepositoryPages
from hub_server.upload_pages import UploadPages
from hub_server.webhook_pages import WebhookPages


class Handler(RepositoryPages, FilePages, UploadPages, DiscussionPages, WebhookPages):
    """Answers the calls of huggingface_hub's client as the Hub does."""
