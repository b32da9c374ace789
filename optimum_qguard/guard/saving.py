"""``save_pretrained`` and ``push_to_hub`` of a guarded model: the library's own checkpoint, and what guard did."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_qguard.checkpoint.publish import publish

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_UPLOAD_OPTIONS = ("commit_message", "commit_description", "private", "create_pr", "revision", "tags")


def save_with_report(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save the model as its class does, then ``qguard.json`` and the model card's section.

    With ``push_to_hub`` that folder is uploaded, as `publish` does.
    """
    repo_id = kwargs.pop("repo_id", Path(save_directory).name) if push_to_hub else ""
    hub = {key: kwargs.pop(key) for key in _UPLOAD_OPTIONS if key in kwargs} if push_to_hub else {}
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        model.qguard_report.write(Path(save_directory))
        if push_to_hub:
            publish(Path(save_directory), repo_id, token=kwargs.get("token"), **hub)


def push_with_report(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload the model with ``qguard.json``, and its card merged with the one that is there.

    Transformers' own would put another card in place of the one that says what guard did.

    Args:
        kwargs: what ``save_pretrained`` takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_with_report(model, folder, token=token, **kwargs)
        return publish(
            folder,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags or (),
        ).info
