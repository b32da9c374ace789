"""``save_pretrained`` of a guarded model: the library's own checkpoint, and beside it what guard did."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def save_with_report(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save the model as its class does, then ``qguard.json`` and the model card's section.

    With ``push_to_hub`` the upload is ``model.push_to_hub``'s, so that these two files are part of it.
    """
    repo_id = kwargs.pop("repo_id", Path(save_directory).name) if push_to_hub else None
    if push_to_hub:
        hub = {key: kwargs.pop(key) for key in ("commit_message", "private", "create_pr", "revision") if key in kwargs}
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        model.qguard_report.write(Path(save_directory))
        if push_to_hub:
            model.push_to_hub(repo_id, token=kwargs.get("token"), **hub)
