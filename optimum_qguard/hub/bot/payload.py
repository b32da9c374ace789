"""What a webhook request says. Format: https://huggingface.co/docs/hub/webhooks#webhook-payloads

``huggingface_hub.WebhookPayload`` knows the commit as ``head_sha`` and so never sees the Hub's ``headSha``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
COMMIT_PATTERN = r"^[0-9a-f]{40}$"
REPOSITORY_PATTERN = rf"^({_NAME}/)?{_NAME}$"

Commit = Annotated[str, Field(pattern=COMMIT_PATTERN)]
RepositoryName = Annotated[str, Field(pattern=REPOSITORY_PATTERN)]


class Event(BaseModel):
    """A model's files changed.

    Attributes:
        repository: ``org/name``.
        commit: that its main branch is at now, never a branch's name: that could be at another commit by the time it
            is scanned.
    """

    model_config = ConfigDict(frozen=True)

    repository: RepositoryName
    commit: Commit


class _Action(BaseModel):
    action: str
    scope: str


class _Repository(BaseModel):
    type: str
    name: str
    head_sha: str | None = Field(default=None, alias="headSha")


class _Payload(BaseModel):
    event: _Action
    repo: _Repository


def parse_event(body: bytes) -> Event | None:
    """The event in a request's body; ``None`` if it is about something that is not scanned.

    Raises:
        ValueError: it is no webhook payload, or names a repository or a commit that cannot be one.
    """
    try:
        payload = _Payload.model_validate_json(body)
        relevant = (
            payload.event.scope == "repo.content"
            and payload.event.action in ("create", "update")
            and payload.repo.type == "model"
            and payload.repo.head_sha is not None
        )
        if not relevant:
            return None
        return Event(repository=payload.repo.name, commit=payload.repo.head_sha or "")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where or 'body'}: {first['msg']}") from error
