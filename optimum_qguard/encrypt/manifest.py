"""``qguard.json`` of an encrypted checkpoint: what was done, and the digests that the way back is checked against."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimum_qguard import __version__
from optimum_qguard.checkpoint import CheckpointError, CheckpointReader
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, PROTECTED_TAG, protection
from optimum_qguard.encrypt.errors import EncryptError

TAGS = (PROTECTED_TAG, "qguard")
Mode = Literal["exact", "dense"]


class TrapParameters(BaseModel):
    """See `optimum_qguard.encrypt.traps.Traps`. Manifests without a ``qk_fraction`` have one for all sites."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: int
    fraction: float
    qk_fraction: float = Field(default_factory=lambda given: given["fraction"])
    positive_only: bool


class ConditioningParameters(BaseModel):
    """See `optimum_qguard.encrypt.conditioning.Conditioning`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kappa_min: float
    kappa_max: float
    plain_layers: int
    spacing: int
    first_layer: int
    last_layer: int | None


class ResidueParameters(BaseModel):
    """See `optimum_qguard.encrypt.residue.Residue`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon_min: float
    epsilon_max: float
    rank: int
    every: int
    first_layer: int
    last_layer: int | None


class MixedTensor(BaseModel):
    """A tensor that dense mode mixed, so that decryption gives it up to rounding.

    Attributes:
        digest: BLAKE3 of its bytes after, in hexadecimal, which it is checked by before it is decrypted.
        relative_error: ``|W' - W| / |W|`` (Frobenius) of what decryption gives, measured while encrypting; 0 if that
            is bit for bit what it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    relative_error: float = Field(ge=0)


class EncryptReport(BaseModel):
    """The manifest.

    Attributes:
        kind: tells it from other reports of the same name.
        schema_version: of this file's layout.
        package_version: of optimum-qguard.
        created: when, UTC.
        model: what was encrypted, as it was named, and ``revision``, the Hub's commit if there was one.
        model_type: what ``config.json`` said: which architecture's sites were used.
        mode: ``"exact"``: powers of two only, nothing is lost; ``"dense"``: ``mixed`` tensors lose their last bits.
        traps, conditioning, residue: mechanisms C, A and B; the latter two in dense mode only.
        key_fingerprint: of the key that undoes it.
        sites: how many of each kind, by kind.
        tensors: BLAKE3 of each tensor's bytes before, in hexadecimal.
        mixed: the tensors that dense mode mixed, by name; none in exact mode.
        files: SHA-256 of each weight file after, in hexadecimal.
        verified: how many tensors were rewritten, each weight checked to come back bit for bit as it was.
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
    mode: Mode = "exact"
    traps: TrapParameters
    conditioning: ConditioningParameters | None = None
    residue: ResidueParameters | None = None
    key_fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    sites: dict[str, int]
    tensors: dict[str, str]
    mixed: dict[str, MixedTensor] = Field(default_factory=dict)
    files: dict[str, str]
    verified: int = Field(ge=0)
    previous_manifest: str | None = None
    previous_card: str | None = None
    notice: str = "Its publisher does not want it quantized; ask them for the key."

    @property
    def inexact(self) -> list[str]:
        """Names of the tensors that do not come back bit for bit."""
        return [name for name, mixed in self.mixed.items() if mixed.relative_error > 0]

    @property
    def relative_error(self) -> float:
        """The largest of any tensor that comes back."""
        return max((mixed.relative_error for mixed in self.mixed.values()), default=0.0)


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
    except CheckpointError as error:
        raise EncryptError(str(error)) from error
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
