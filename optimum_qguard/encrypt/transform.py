"""A checkpoint in, a checkpoint out: encrypt it with a key, and decrypt it again, streaming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock

import torch
from blake3 import blake3
from torch import Tensor

from optimum_qguard.checkpoint import (
    CheckpointError,
    CheckpointReader,
    TensorInfo,
    atomic_write,
    merge_card,
    open_checkpoint,
)
from optimum_qguard.checkpoint.card import CARD_FILE
from optimum_qguard.checkpoint.origin import name_and_revision
from optimum_qguard.checkpoint.output import check_output, check_space, copy_other_files, output_folder
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, protection
from optimum_qguard.checkpoint.reader import INDEX_FILE
from optimum_qguard.checkpoint.stream import rewrite_shards
from optimum_qguard.encrypt.architectures import find_sites
from optimum_qguard.encrypt.change import Change, changes
from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.manifest import (
    TAGS,
    ConditioningParameters,
    EncryptReport,
    MixedTensor,
    Mode,
    ResidueParameters,
    TrapParameters,
    read_manifest,
)
from optimum_qguard.encrypt.residue import Residue
from optimum_qguard.encrypt.scaling import InexactError
from optimum_qguard.encrypt.sites import Site
from optimum_qguard.encrypt.traps import Traps

Progress = Callable[[int, int], None]

FP16_SAFE = Traps(strength=9, fraction=1 / 16, positive_only=True)
"""Traps that survive inference in FP16."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def encrypt_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    key: Key,
    mode: Mode = "exact",
    traps: Traps | None = None,
    conditioning: Conditioning | None = None,
    residue: Residue | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncryptReport:
    """Write a checkpoint that computes the same and that standard quantizers break.

    Every tensor is multiplied by powers of two that the key chooses, and that nothing is lost is checked while it is
    written; in exact mode the checkpoint computes the same to the last bit, and comes back so. Dense mode also mixes
    the channels of each key-value head between value and output projection: harder to undo without the key, but the
    outputs are those of the original up to rounding, and so are those tensors when they come back.
    The output has the input's files, names, shapes and dtypes; beside them lies ``qguard.json``, and the model card has
    a section that says so. This is not cryptography: see docs/encrypt.md for what it stops.

    Args:
        model: a folder, or a Hub id with optional ``@revision``, of a full-precision safetensors checkpoint.
        out: the output folder, there whole or not at all.
        key: what undoes it.
        mode: ``"exact"`` or ``"dense"``.
        traps: how strong; by default `Traps`'s own defaults.
        conditioning, residue: likewise, in dense mode only.
        workers: how many files are written at the same time.
        overwrite: see `output_folder`.
        progress: called after each tensor with how many bytes are done, and of how many.

    Raises:
        EncryptError: quantized already, an adapter without its model, a weight that cannot be multiplied exactly, or
            parameters that do not fit the mode or the model.
        ArchitectureError: an architecture whose sites are not known, or one with tensors that are not.
        CheckpointError: the input cannot be read or the output not written.
    """
    traps = traps or Traps()
    if mode == "dense":
        conditioning, residue = conditioning or Conditioning(), residue or Residue()
    elif mode != "exact":
        raise EncryptError(f"mode is 'exact' or 'dense', not {mode!r}")
    elif conditioning is not None or residue is not None:
        raise EncryptError("conditioning and residue round weights, so they need mode='dense'")
    reader = open_checkpoint(model)
    _refuse(reader, mode)
    check_output(out, reader.folder, overwrite=overwrite)
    check_space(out, reader.n_bytes)
    sites = _sites(reader)
    by_tensor = changes(sites, key, traps=traps, conditioning=conditioning, residue=residue)
    for tensor in _no_floats(reader, by_tensor):
        kind = str(reader.tensors[tensor].dtype).removeprefix("torch.")
        raise EncryptError(f"{tensor}: is {kind}, so the model is quantized already; name its full-precision original")
    name, revision = name_and_revision(model, reader)
    with output_folder(out, reader.folder, overwrite=overwrite, flushed=reader.shards) as staging:
        done, files = _rewrite(reader, staging, by_tensor, workers, progress, inverse=False)
        report = EncryptReport(
            model=name,
            revision=revision,
            model_type=str(reader.config["model_type"]),
            mode=mode,
            traps=TrapParameters(**vars(traps)),
            conditioning=None if conditioning is None else ConditioningParameters(**vars(conditioning)),
            residue=None if residue is None else ResidueParameters(**vars(residue)),
            key_fingerprint=key.fingerprint,
            sites=dict(Counter(site.kind for site in sites)),
            tensors={name: rewritten.digest for name, rewritten in done.items()},
            mixed={
                name: MixedTensor(digest=rewritten.encrypted_digest, relative_error=rewritten.relative_error)
                for name, rewritten in done.items()
                if rewritten.whole
            },
            files=files,
            verified=sum(not change.mixes for change in by_tensor.values()),
            previous_manifest=_text(reader, MANIFEST_FILE),
            previous_card=_text(reader, CARD_FILE),
        )
        copy_other_files(reader, staging, leave=[MANIFEST_FILE])
        merge_card(staging, section_id="encrypt", markdown=_card_section(report), tags=TAGS)
        atomic_write(staging / MANIFEST_FILE, report.model_dump_json(indent=2) + "\n")
    return report


def decrypt_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    key: Key,
    workers: int = 2,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncryptReport:
    """Write the checkpoint that was encrypted, and return the manifest that it was checked against.

    All tensors come back bit for bit, but for those that dense mode mixed: they come back up to rounding. Which of them
    differ is in ``mixed`` of what is returned, as it was found now.

    Args:
        model: a folder, or a Hub id with optional ``@revision``, that `encrypt_checkpoint` wrote.
        out, key, workers, overwrite, progress: as for `encrypt_checkpoint`.

    Raises:
        EncryptError: no manifest, another key, or tensors that are not those that were encrypted; nothing is written.
        CheckpointError: the input cannot be read or the output not written.
    """
    reader = open_checkpoint(model)
    report = read_manifest(reader)
    by_tensor = unlocking(reader, report, key)
    check_output(out, reader.folder, overwrite=overwrite)
    check_space(out, reader.n_bytes)
    with output_folder(out, reader.folder, overwrite=overwrite, flushed=reader.shards) as staging:
        done, _ = _rewrite(reader, staging, by_tensor, workers, progress, inverse=True)
        for tensor, digest in report.tensors.items():
            if tensor in report.mixed:
                check_digest(reader.folder, tensor, done[tensor].encrypted_digest, report.mixed[tensor].digest)
            else:
                check_digest(reader.folder, tensor, done[tensor].digest, digest)
        copy_other_files(reader, staging, leave=[MANIFEST_FILE, CARD_FILE])
        for file, text in ((MANIFEST_FILE, report.previous_manifest), (CARD_FILE, report.previous_card)):
            if text is not None:
                atomic_write(staging / file, text)
    restored = [name for name in report.mixed if done[name].digest == report.tensors[name]]
    exact = {name: report.mixed[name].model_copy(update={"relative_error": 0.0}) for name in restored}
    return report.model_copy(update={"mixed": report.mixed | exact})


def unlocking(reader: CheckpointReader, report: EncryptReport, key: Key) -> Mapping[str, Change]:
    """What an encrypted checkpoint's tensors were changed by.

    Raises:
        EncryptError: another key, tensors that the manifest does not know, or parameters that do not fit the model.
    """
    if key.fingerprint != report.key_fingerprint:
        raise EncryptError(
            f"{reader.folder}: was encrypted with another key (its fingerprint is {report.key_fingerprint[:16]}…, this "
            f"one's {key.fingerprint[:16]}…)"
        )
    if reader.tensors.keys() != report.tensors.keys():
        differing = sorted(reader.tensors.keys() ^ report.tensors.keys())[0]
        raise EncryptError(f"{reader.folder}: not the checkpoint that was encrypted: {differing} is not in both")
    by_tensor = changes(
        _sites(reader),
        key,
        traps=Traps(**report.traps.model_dump()),
        conditioning=None if report.conditioning is None else Conditioning(**report.conditioning.model_dump()),
        residue=None if report.residue is None else Residue(**report.residue.model_dump()),
    )
    for tensor in _no_floats(reader, by_tensor):
        raise changed_since(reader.folder, tensor)
    if report.mixed.keys() != {name for name, change in by_tensor.items() if change.mixes}:
        raise EncryptError(f"{reader.folder}: {MANIFEST_FILE} was changed or damaged (mixed); download it again")
    return by_tensor


def check_digest(model: Path, tensor: str, found: str | None, expected: str) -> None:
    """Raise `EncryptError` if a decrypted tensor is not the one that was encrypted."""
    if found != expected:
        raise changed_since(model, tensor)


def changed_since(model: Path, tensor: str) -> EncryptError:
    """The error for a tensor that is not the one that was encrypted."""
    return EncryptError(
        f"{model}: {tensor} is not the tensor that was encrypted: the file was changed afterwards; "
        "get the checkpoint from its publisher again"
    )


class _Rewritten:
    """One tensor on its way: hashed as it was (or as it becomes, on the way back), and changed.

    Attributes:
        digest: of the plain tensor.
        encrypted_digest: of the encrypted one, if it is mixed.
        relative_error: of what will come back; see `MixedTensor`.
    """

    def __init__(self, change: Change, inverse: bool) -> None:
        self.whole = change.mixes
        self.digest = self.encrypted_digest = ""
        self.relative_error = 0.0
        self._change = change
        self._inverse = inverse
        self._plain = blake3()
        self._encrypted = blake3()

    def piece(self, rows: Tensor, start: int) -> Tensor:
        before, after = (self._encrypted, self._plain) if self._inverse else (self._plain, self._encrypted)
        if before is self._plain or self.whole:
            _update(before, rows)
        original = rows.clone() if self.whole and not self._inverse else None
        rows = self._change.apply(rows, start, inverse=self._inverse)
        if after is self._plain or self.whole:
            _update(after, rows)
        if original is not None:
            restored = self._change.apply(rows.clone(), start, inverse=True)
            self.relative_error = _relative_error(restored, original)
        return rows

    def done(self) -> None:
        self.digest, self.encrypted_digest = self._plain.hexdigest(), self._encrypted.hexdigest()


def _update(digest: blake3, rows: Tensor) -> None:
    digest.update(rows.contiguous().flatten().view(torch.uint8).numpy().data)


def _relative_error(tensor: Tensor, original: Tensor) -> float:
    difference = float((tensor.double() - original.double()).norm())
    return difference / float(original.double().norm()) if difference else 0.0


def _rewrite(
    reader: CheckpointReader,
    staging: Path,
    by_tensor: Mapping[str, Change],
    workers: int,
    progress: Progress | None,
    *,
    inverse: bool,
) -> tuple[dict[str, _Rewritten], dict[str, str]]:
    """Write all files; what was found about each tensor, and digests of the files that were written (SHA-256)."""
    rewritten: dict[str, _Rewritten] = {}
    total = sum(info.n_bytes for info in reader.tensors.values())
    done, lock = 0, Lock()

    def rewrite(info: TensorInfo) -> _Rewritten:
        rewritten[info.name] = _Rewritten(by_tensor.get(info.name, Change()), inverse)
        return rewritten[info.name]

    def count(info: TensorInfo) -> None:
        nonlocal done
        with lock:
            done += info.n_bytes
            if progress is not None:
                progress(done, total)

    try:
        files = rewrite_shards(reader, staging, rewrite, workers=workers, progress=count)
    except InexactError as error:
        name = str(error)
        # What was multiplied exactly can be divided exactly.
        raise (changed_since(reader.folder, name) if inverse else by_tensor[name].explain(reader.read(name))) from error
    if reader.index is not None:
        atomic_write(staging / INDEX_FILE, reader.index)
    return {name: rewritten[name] for name in reader.tensors}, dict(files)


def _sites(reader: CheckpointReader) -> list[Site]:
    return find_sites(reader.config, {name: info.shape for name, info in reader.tensors.items()})


def _no_floats(reader: CheckpointReader, by_tensor: Iterable[str]) -> list[str]:
    """Which of these tensors have a dtype that cannot be changed."""
    return [name for name in by_tensor if reader.tensors[name].dtype not in _FLOATS]


def _refuse(reader: CheckpointReader, mode: Mode) -> None:
    quantized = reader.quantization_config
    if quantized is not None:
        raise EncryptError(
            f"{reader.folder}: is quantized already ({quantized.get('quant_method', 'unknown method')}); name its "
            "full-precision original"
        )
    if any(".lora_" in name for name in reader.tensors):
        raise EncryptError(f"{reader.folder}: holds a LoRA adapter; merge it into its model first, and name that")
    for info in reader.tensors.values():
        if info.dtype.is_floating_point and info.dtype not in _FLOATS:
            kind = str(info.dtype).removeprefix("torch.")
            raise EncryptError(f"{info.name}: is {kind}, too narrow for exact scaling; name a BF16 checkpoint")
    if not reader.config:
        raise EncryptError(f"{reader.folder}: has no config.json, so its architecture is unknown")
    if mode == "dense" and _is_encrypted(reader):
        raise EncryptError(
            f"{reader.folder}: is encrypted already, and dense mode would not give back the bits that its manifest is "
            "checked against; decrypt it first, or use exact mode on top"
        )


def _is_encrypted(reader: CheckpointReader) -> bool:
    try:
        return protection(reader.file(MANIFEST_FILE)) is not None
    except CheckpointError:  # no JSON: somebody else's file
        return False


def _text(reader: CheckpointReader, name: str) -> str | None:
    path = reader.file(name)
    try:
        return path.read_bytes().decode() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise EncryptError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _card_section(report: EncryptReport) -> str:
    if report.mode == "exact":
        same = "computes exactly what the original does, bit for bit, in the precision it is stored in"
    else:
        same = "computes what the original does up to rounding"
    return (
        "## Protected against quantization\n\n"
        f"The weights of this checkpoint were rewritten by optimum-qguard {report.package_version} so that it {same}, "
        "and standard post-training quantization breaks it. Please use it as it is; to quantize it, ask its publisher, "
        f"who has the key (fingerprint `{report.key_fingerprint[:16]}`). This is no encryption of the content: anybody "
        f"can run the model. Details: `{MANIFEST_FILE}`.\n"
    )
