"""What a repository says of itself, in ``qguard.json`` and in its card, against what is in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from optimum_qguard.checkpoint.card import CARD_FILE, card_tags
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.protection import GUARDED_TAG, MANIFEST_FILE, PROTECTED, PROTECTED_TAG
from optimum_qguard.checkpoint.repository import Repository
from optimum_qguard.scan.finding import Finding, listed
from optimum_qguard.scan.subject import Subject

_LARGEST_CARD = 4 << 20
_CHUNK = 8 << 20
_Digest = Annotated[str, Field(pattern=re.compile("^[0-9a-f]{64}$"))]

_finding = partial(Finding, detector="provenance", file=MANIFEST_FILE)


class _Encrypted(BaseModel):
    """What is checked of the manifest of an encrypted checkpoint."""

    schema_version: Literal[1]
    key_fingerprint: _Digest
    tensors: dict[str, _Digest]
    files: dict[str, _Digest] = Field(min_length=1)


class _GuardedTensor(BaseModel):
    name: str


class _Guarded(BaseModel):
    """What is checked of the report of a guarded model."""

    schema_version: Literal[1]
    seed: _Digest
    fresh_seed: bool
    quantization_config: dict[str, Any]
    tensors: list[_GuardedTensor]


def has_claims(subject: Subject) -> bool:
    """Whether it says anything of itself."""
    return MANIFEST_FILE in subject.repository.files or not {PROTECTED_TAG, GUARDED_TAG}.isdisjoint(_tags(subject))


def check_claims(subject: Subject) -> Iterator[Finding]:
    """The manifest against the files, and the card's tags against the manifest."""
    if MANIFEST_FILE in subject.problems:
        yield _finding(severity="error", message=subject.problems[MANIFEST_FILE])
        return
    kind = None
    if subject.manifest.get("kind") == PROTECTED:
        kind = PROTECTED_TAG
    elif "quantization_config" in subject.manifest:
        kind = GUARDED_TAG
    elif MANIFEST_FILE in subject.repository.files:
        message = f"{MANIFEST_FILE} is neither the manifest of an encrypted checkpoint nor the report of a guarded one."
        yield _finding(severity="warning", message=message)
    yield from _check_tags(subject, kind)
    if kind is None:
        return
    version = subject.manifest.get("schema_version")
    if type(version) is int and version > 1:
        message = f"{MANIFEST_FILE} has schema version {version}; update optimum-qguard to have it checked."
        yield _finding(severity="note", message=message, unsettled=True)
        return
    try:
        if kind == PROTECTED_TAG:
            yield from _check_encrypted(subject, _Encrypted.model_validate(subject.manifest))
        else:
            yield from _check_guarded(subject, _Guarded.model_validate(subject.manifest))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = f"{MANIFEST_FILE} was changed or damaged ({where:.100}: {problem['msg']})."
        yield _finding(severity="error", message=message)


def _check_tags(subject: Subject, kind: str | None) -> Iterator[Finding]:
    tags = _tags(subject)
    for tag in (PROTECTED_TAG, GUARDED_TAG):
        if tag in tags and tag != kind:
            message = f"The card has the tag {tag}, but no {MANIFEST_FILE} bears it out."
            yield _finding(severity="warning", file=CARD_FILE, message=message)
        if tag == kind and tag not in tags:
            message = f"{MANIFEST_FILE} says that the repository is {tag}, and its card does not."
            yield _finding(severity="note", message=message)


def _check_encrypted(subject: Subject, manifest: _Encrypted) -> Iterator[Finding]:
    repository = subject.repository
    missing = [file for file in manifest.files if file not in repository.files]
    if missing:
        message = f"Files that {MANIFEST_FILE} vouches for are not there: {listed(missing)}."
        yield _finding(severity="error", message=message)
    more = [file for file in repository.files if file.endswith(".safetensors") and file not in manifest.files]
    if more:
        message = f"Weight files that {MANIFEST_FILE} knows nothing of: {listed(more)}."
        yield _finding(severity="warning", message=message)
    stored = {tensor.info.name for tensor in subject.tensors.values()}
    absent = [name for name in manifest.tensors if name not in stored]
    strange = [name for name in stored if name not in manifest.tensors]
    if (absent or strange) and not missing:
        message = f"{MANIFEST_FILE} lists other tensors than there are: {listed(sorted(absent + strange))}."
        yield _finding(severity="error", message=message)
    other, unknown = [], []
    for file, digest in manifest.files.items():
        if file in repository.files:
            found = repository.files[file].sha256
            if found is None and subject.full and repository.local_folder is not None:
                found = _sha256(repository, file)
            if found is None:
                unknown.append(file)
            elif found != digest:
                other.append(file)
    if other:
        message = (
            f"Files are not those that {MANIFEST_FILE} vouches for: the SHA-256 of {listed(other)} is another one."
        )
        yield _finding(severity="error", message=message)
    if unknown:
        message = (
            f"The SHA-256 of {listed(unknown)} was not compared with {MANIFEST_FILE}; a full scan of a folder does."
        )
        yield _finding(severity="note", message=message)


def _check_guarded(subject: Subject, report: _Guarded) -> Iterator[Finding]:
    stored: set[str] = set()  # modules, for the quantizer may have given the tensor in it other names
    for tensor in subject.tensors.values():
        stored |= set(accumulate(tensor.info.name.split("."), "{}.{}".format))
    absent = [tensor.name for tensor in report.tensors if tensor.name.removesuffix(".weight") not in stored]
    if absent:
        message = f"Tensors that {MANIFEST_FILE} says were guarded are not there: {listed(absent)}."
        yield _finding(severity="warning", message=message)
    if "quant_method" in report.quantization_config and not subject.config.get("quantization_config"):
        message = f"{MANIFEST_FILE} says that the weights were quantized, and the configuration does not."
        yield _finding(severity="warning", message=message)
    if not report.fresh_seed:
        message = f"{MANIFEST_FILE} says that the seed was known before; whoever knew it could plan for the noise."
        yield _finding(severity="note", message=message)


def _tags(subject: Subject) -> list[str]:
    repository = subject.repository
    if CARD_FILE not in repository.files or repository.files[CARD_FILE].size > _LARGEST_CARD:
        return []
    try:
        return card_tags(repository.read(CARD_FILE).decode(errors="replace"))
    except CheckpointError:
        return []


def _sha256(repository: Repository, file: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, repository.files[file].size, _CHUNK):
        digest.update(repository.read(file, start, _CHUNK))
    return digest.hexdigest()
