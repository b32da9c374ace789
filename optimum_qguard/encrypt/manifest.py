"""``qguard.json`` of an encrypted checkpoint: what was done, and the digests that the way back is checked against."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimum_qguard import __version__
from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, protection
from optimum_qguard.encrypt.errors import EncryptError

TAGS = ("quantization-protected", "qguard")


class TrapParameters(BaseModel):
    """See `optimum_qguard.encrypt.traps.Traps`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: int
    fraction: float
    positive_only: bool


class EncryptReport(BaseModel):
    """The manifest.

    Attributes:
        kind: tells it from other reports of the same name.
        schema_version: of this file's layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: what was encrypted, as it was named, and ``revision``, the Hub's commit if there was one.
        model_type: what ``config.json`` said: which architecture's sites were used.
        mode: ``"exact"``: powers of two only, nothing is lost.
        traps: mechanism C.
        key_fingerprint: of the key that undoes it.
        sites: how many of each kind, by kind.
        tensors: BLAKE3 of each tensor's bytes before, in hexadecimal.
        files: SHA-256 of each weight file after, in hexadecimal.
        verified: how many tensors were multiplied, divided again and found to be bit for bit what they were.
        previous_manifest: the text of the ``qguard.json`` that was there before, put back by decryption; where that is
            a manifest too, the checkpoint was encrypted more than once, and the keys are needed in reverse order.
        previous_card: likewise of the model card.
        notice: what people read who try to quantize it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["encrypted"] = "encrypted"
    schema_version: Literal[1] = 1
    package_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    model: str
    revision: str | None = None
    model_type: str
    mode: Literal["exact"] = "exact"
    traps: TrapParameters
    key_fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    sites: dict[str, int]
    tensors: dict[str, str]
    files: dict[str, str]
    verified: int = Field(ge=0)
    previous_manifest: str | None = None
    previous_card: str | None = None
    notice: str = "Its publisher does not want it quantized; ask them for the key."


def read_manifest(reader: CheckpointReader, path: Path | None = None) -> EncryptReport:
    """The manifest of an encrypted checkpoint.

    Args:
        path: where it is, if not in the checkpoint's folder.

    Raises:
        EncryptError: there is none, or it cannot be read.
    """
    path = path or reader.file(MANIFEST_FILE)
    try:
        content = protection(path)
    except (OSError, ValueError) as error:
        raise EncryptError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if content is None:
        raise EncryptError(f"{reader.folder}: no encrypted checkpoint: it has no {MANIFEST_FILE} that says so")
    if content.get("schema_version") != 1:
        raise EncryptError(f"{path}: has schema version {content.get('schema_version')}; update optimum-qguard")
    try:
        return EncryptReport.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise EncryptError(f"{path}: was changed or damaged ({where}: {problem['msg']}); download it again") from error
