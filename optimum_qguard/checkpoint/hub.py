"""Fetches a checkpoint from the Hugging Face Hub into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from optimum_qguard.checkpoint.errors import CheckpointError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[^@\s]+)?")
_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "*.py",
    "LICENSE*",
]
_UNUSED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


def looks_like_hub_id(model: str) -> bool:
    """Whether ``model`` has the form of a Hub id, ``name`` or ``org/name``, with or without ``@revision``."""
    return _HUB_ID.fullmatch(model) is not None


def download_snapshot(model: str, revision: str | None = None) -> Path:
    """Folder in the Hub's cache that holds the safetensors checkpoint and its configuration and tokenizer.

    Args:
        model: ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit; not together with ``@revision``.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo_id, _, tail = model.partition("@")
    if tail and revision:
        raise CheckpointError(f"{model}: has a revision, and another one ({revision}) is given beside it; give one")
    try:
        folder = snapshot_download(
            repo_id, revision=tail or revision, allow_patterns=_PATTERNS, ignore_patterns=_UNUSED
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{model}: no such folder, and the Hub's repository cannot be read ({reason})") from error
    return Path(folder)
