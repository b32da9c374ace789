"""Uploads a folder that a verb wrote to the Hub, in one commit: weights, ``qguard.json`` or ``repair.json``, and a card
that is merged with the one that is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from optimum_qguard.checkpoint.card import CARD_FILE, described_card, merged_cards
from optimum_qguard.checkpoint.description import (
    BLOCK_KEY,
    described_block,
    described_metadata,
    description_file,
    read_description,
)
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import http_errors, hub_problem, looks_like_hub_id
from optimum_qguard.checkpoint.protection import MANIFEST_FILE
from optimum_qguard.checkpoint.reader import PICKLE_SUFFIXES, CheckpointReader, holds_key, is_key_file
from optimum_qguard.checkpoint.repository import FolderRepository

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_STALE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Published:
    """What was uploaded.

    Attributes:
        repo_id: where.
        commit: its hash.
        url: of the commit, or of the pull request.
        pull_request: its number.
        files: what was uploaded, sorted; what the Hub had already is among them.
        deleted: weight files of the model that was there before, which a loader might prefer.
        left_out: pickles, key files and links out of the folder, which are not uploaded.
        info: what the client returns.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: int | None
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    info: CommitInfo


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] = (),
    block: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    include_pickles: bool = False,
) -> Published:
    """Upload a folder, as one commit or one pull request. The folder itself stays as it is.

    The repository's card is kept: the folder's sections, tags and metadata are put into it. The card says under
    ``qguard`` what ``qguard.json`` or ``repair.json`` says, and is checked by the Hub before anything is uploaded.
    Hidden files and keys are never uploaded, pickles only if asked for.

    Args:
        folder: what ``qguard guard``, ``encrypt`` or ``repair`` wrote, or a saved guarded model.
        repo_id: ``name`` or ``org/name``; made if missing.
        private: whether a new repository is private. ``True`` with one that is there and public is an error.
        create_pr: open a pull request instead of writing to the repository.
        revision: the branch, made if missing; not with ``create_pr``.
        commit_message: the commit's title; by default it says what was done.
        commit_description: its text.
        token: as in huggingface_hub; by default ``HF_TOKEN`` or that of ``hf auth login``.
        tags: for the card, beside those of the folder's.
        block: what the card says under ``qguard`` beside that.
        results: for ``model-index`` in the card.
        include_pickles: upload them too.

    Raises:
        CheckpointError: the folder has no safetensors weights or neither of those files, they do not belong together,
            it holds a key; no token, no right to write, a card that the Hub refuses; no connection, or a commit by
            somebody else in the meantime.
    """
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    folder = Path(folder).expanduser()
    description, files, left_out = _check_folder(folder, include_pickles)
    if not looks_like_hub_id(repo_id) or "@" in repo_id:
        raise CheckpointError(f"{repo_id}: no name of a repository; give one as org/name, and a branch by --revision")
    if create_pr and revision not in (None, "main"):
        raise CheckpointError(f"{repo_id}: a pull request is made to main; give --create-pr or --revision, not both")
    if not (token or get_token()):
        raise CheckpointError(f"{repo_id}: no token to upload with; set HF_TOKEN, or run: hf auth login")
    api = HfApi(token=token, library_name="optimum-qguard")
    try:
        said = described_block(description) | dict(block or {})
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{description_file(folder)}: was changed or damaged ({type(error).__name__}: {error}); write it again"
        ) from error
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        parent, branch_exists, present = _look(api, repo_id, private, revision)
        card = described_card(
            _present_card(api, repo_id, folder, parent if CARD_FILE in present else None),
            tags=tags,
            metadata=described_metadata(description),
            own={BLOCK_KEY: said},
            results=results,
            model_name=repo_id.partition("/")[2],
        )
        _validate(card)
        if parent is None:
            api.create_repo(repo_id, private=private)
        if revision is not None and not branch_exists:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        deleted = sorted(name for name in present if _STALE.fullmatch(name) and name not in files)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files if name != CARD_FILE
        ]
        operations.append(CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card.encode()))
        operations += [CommitOperationDelete(path_in_repo=name) for name in deleted]
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload a checkpoint made by qguard {said['method']}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, http_errors()) as error:
        raise _not_uploaded(repo_id, error, revision) from error
    assert isinstance(info, CommitInfo)
    return Published(
        repo_id=repo_id,
        commit=info.oid,
        url=info.pr_url or info.commit_url,
        pull_request=info.pr_num,
        files=tuple(sorted({*files, CARD_FILE})),
        deleted=tuple(deleted),
        left_out=tuple(left_out),
        info=info,
    )


def _check_folder(folder: Path, include_pickles: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """Its description, and the files to upload and to leave out."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name one that a verb of qguard wrote")
    reader = CheckpointReader(folder)
    description = read_description(folder)
    hashes = description.get("files")
    for name, digest in hashes.items() if isinstance(hashes, dict) else ():
        if name not in reader.shards or _sha256(reader.file(name)) != digest:
            raise CheckpointError(
                f"{folder}: {name} is not what {MANIFEST_FILE} says (its SHA-256); one of them was changed: write the "
                "checkpoint again"
            )
    listed = FolderRepository(folder)
    files, left_out = [], list(listed.stray_links)
    for name in listed.files:
        path = PurePosixPath(name)
        if is_key_file(path) or (path.suffix.lower() in PICKLE_SUFFIXES and not include_pickles):
            left_out.append(name)
            continue
        if holds_key(folder / name):
            raise CheckpointError(
                f"{folder / name}: holds a key; move it out of the folder, or nobody needs it any more"
            )
        files.append(name)
    return description, files, sorted(left_out)


def _look(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None
) -> tuple[str | None, bool, frozenset[str]]:
    """The commit to build on (``None``: no such repository yet), whether the branch is there, and the files in it."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id, timeout=30)
    except RepositoryNotFoundError:
        return None, False, frozenset()
    if private and not info.private:
        raise CheckpointError(
            f"{repo_id}: is there already and is public; make it private in its settings, or leave out --private"
        )
    exists = revision is not None
    if revision is not None:
        try:
            info = api.model_info(repo_id, revision=revision, timeout=30)
        except RevisionNotFoundError:
            exists = False
    return info.sha, exists, frozenset(sibling.rfilename for sibling in info.siblings or ())


def _present_card(api: HfApi, repo_id: str, folder: Path, commit: str | None) -> str:
    """The folder's card, merged with the one in a commit."""
    try:
        local = (folder / CARD_FILE).read_bytes().decode() if (folder / CARD_FILE).exists() else ""
        present = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=commit)).read_bytes().decode() if commit else ""
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{CARD_FILE}: not UTF-8 text; convert it") from error
    return merged_cards(present, local)


def _validate(card: str) -> None:
    """Have the Hub check it."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card, ignore_metadata_errors=True).validate()
    except ValueError as error:
        raise CheckpointError(f"{CARD_FILE}: the Hub refuses its metadata: {' '.join(str(error).split())}") from error


def _not_uploaded(repo_id: str, error: BaseException, revision: str | None) -> CheckpointError:
    response = getattr(error, "response", None)
    if response is not None and response.status_code == 412:
        return CheckpointError(f"{repo_id}: was changed by somebody while this was uploaded; run it again")
    return CheckpointError(f"{repo_id}: cannot be uploaded to: {hub_problem(error, revision)}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
