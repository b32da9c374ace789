"""The Hugging Face Hub: names of repositories, a checkpoint in its cache, and what its refusals mean."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.errors import CheckpointError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[^@\s]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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


def split_hub_id(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Repository and revision of ``name``, ``org/name`` or one of them with ``@revision``.

    Raises:
        CheckpointError: a revision stands there and another one is given beside it.
    """
    repo_id, _, tail = model.partition("@")
    if tail and revision:
        raise CheckpointError(f"{model}: has a revision, and another one ({revision}) is given beside it; give one")
    return repo_id, tail or revision


def commit_of(files: Sequence[str | Path]) -> str | None:
    """The commit that files in the Hub's cache are of (``.../snapshots/<commit>/...``); ``None`` for others."""
    for part, name in itertools.pairwise(Path(files[0]).parts if files else ()):
        if part == "snapshots" and _COMMIT.fullmatch(name):
            return name
    return None


def download_snapshot(model: str, revision: str | None = None) -> Path:
    """Folder in the Hub's cache that holds the safetensors checkpoint and its configuration and tokenizer.

    What an interrupted download has left is taken up again.

    Args:
        model: ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit; not together with ``@revision``.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo_id, revision = split_hub_id(model, revision)
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_UNUSED)
    except (HfHubHTTPError, HFValidationError, OSError, http_errors()) as error:
        raise not_readable(model, hub_problem(error, revision)) from error
    return Path(folder)


def not_readable(model: str, problem: str) -> CheckpointError:
    """The error for something that is neither a folder nor a repository that can be read."""
    return CheckpointError(f"{model}: no such folder, and the Hub's repository cannot be read: {problem}")


def http_errors() -> type[Exception]:
    """What every failure on the way to the Hub and back is, in the library that its client speaks HTTP with: httpx, or
    its successor."""
    from huggingface_hub import get_session

    library = next(kind.__module__.partition(".")[0] for kind in type(get_session()).mro() if kind.__name__ == "Client")
    errors: type[Exception] = importlib.import_module(library).RequestError
    return errors


def hub_problem(error: BaseException, revision: str | None = None) -> str:
    """What went wrong with the Hub and what to do about it, in words.

    Args:
        error: what its client raised.
        revision: that was asked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return refusal(response, revision)
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on, and it is not in the cache; unset HF_HUB_OFFLINE"
        if isinstance(cause, HFValidationError):
            return _one_line(cause)
        if isinstance(cause, http_errors()):
            return f"{constants.ENDPOINT} does not answer ({_one_line(cause)}); check the network, or try again later"
    return _one_line(error)


def refusal(response: Any, revision: str | None = None) -> str:
    """Likewise for an answer that says no.

    Args:
        response: its status and headers.
        revision: that was asked for.
    """
    from huggingface_hub import constants, get_token

    code, message = response.headers.get("X-Error-Code"), response.headers.get("X-Error-Message")
    signed_in = bool(get_token())
    if code == "GatedRepo":
        ask = f"ask for access on its page at {constants.ENDPOINT}"
        return f"it is gated; {ask}" if signed_in else f"it is gated; {ask}, and set HF_TOKEN to your token"
    if code == "RevisionNotFound":
        return f"it has no branch, tag or commit {revision or 'main'}"
    if code == "EntryNotFound":
        return "a file is missing in it; it may have changed meanwhile"
    if message == "Invalid credentials in Authorization header":
        return f"the token is not valid; make a new one at {constants.ENDPOINT}/settings/tokens, and set HF_TOKEN to it"
    if code == "RepoNotFound" or response.status_code in (401, 404):
        token = "your token has no access to it" if signed_in else "it is private: set HF_TOKEN to a token with access"
        return f"there is no such repository, or {token}"
    if response.status_code == 403:
        said = f" ({_one_line(message)})" if message else ""
        return f"your token may not do that{said}; use one that may, made at {constants.ENDPOINT}/settings/tokens"
    if response.status_code == 429:
        return "the Hub was asked too often; try again later, or set HF_TOKEN to be allowed more"
    return f"{constants.ENDPOINT} answers with status {response.status_code}; try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on: the client's own often says the least."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
