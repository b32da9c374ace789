"""A checkpoint in, a checkpoint out: encrypt it with a key, and decrypt it again, streaming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

import torch
from blake3 import blake3
from torch import Tensor

from optimum_qguard.checkpoint import CheckpointReader, TensorInfo, atomic_write, merge_card, open_checkpoint
from optimum_qguard.checkpoint.card import CARD_FILE
from optimum_qguard.checkpoint.origin import name_and_revision
from optimum_qguard.checkpoint.output import check_output, check_space, copy_other_files, output_folder
from optimum_qguard.checkpoint.protection import MANIFEST_FILE
from optimum_qguard.checkpoint.reader import INDEX_FILE
from optimum_qguard.checkpoint.stream import rewrite_shards
from optimum_qguard.encrypt.architectures import find_sites
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.manifest import TAGS, EncryptReport, TrapParameters, read_manifest
from optimum_qguard.encrypt.scaling import InexactError, Scaling, scalings
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
    traps: Traps | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncryptReport:
    """Write a checkpoint that computes exactly the same and that standard quantizers break.

    Every tensor is multiplied by powers of two that the key chooses, divided again and compared, while it is written.
    The output has the input's files, names, shapes and dtypes; beside them lies ``qguard.json``, and the model card has
    a section that says so. This is not cryptography: see docs/encrypt.md for what it stops.

    Args:
        model: a folder, or a Hub id with optional ``@revision``, of a full-precision safetensors checkpoint.
        out: the output folder, there whole or not at all.
        key: what undoes it.
        traps: how strong; by default `Traps`'s own defaults.
        workers: how many files are written at the same time.
        overwrite: see `output_folder`.
        progress: called after each tensor with how many bytes are done, and of how many.

    Raises:
        EncryptError: quantized already, an adapter without its model, or a weight that cannot be multiplied exactly.
        ArchitectureError: an architecture whose sites are not known, or one with tensors that are not.
        CheckpointError: the input cannot be read or the output not written.
    """
    traps = traps or Traps()
    reader = open_checkpoint(model)
    _refuse(reader)
    check_output(out, reader.folder, overwrite=overwrite)
    check_space(out, reader.n_bytes)
    sites = _sites(reader)
    by_tensor = scalings(sites, lambda site: traps.exponents(key, site))
    name, revision = name_and_revision(model, reader)
    with output_folder(out, reader.folder, overwrite=overwrite) as staging:
        digests, files = _rewrite(reader, staging, by_tensor, workers, progress, inverse=False)
        report = EncryptReport(
            model=name,
            revision=revision,
            model_type=str(reader.config["model_type"]),
            traps=TrapParameters(**vars(traps)),
            key_fingerprint=key.fingerprint,
            sites=dict(Counter(site.kind for site in sites)),
            tensors=digests,
            files=files,
            verified=len(by_tensor),
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
    """Write the checkpoint that was encrypted, bit for bit, and return the manifest that it was checked against.

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
    with output_folder(out, reader.folder, overwrite=overwrite) as staging:
        digests, _ = _rewrite(reader, staging, by_tensor, workers, progress, inverse=True)
        for tensor, digest in report.tensors.items():
            check_digest(reader.folder, tensor, digests.get(tensor), digest)
        copy_other_files(reader, staging, leave=[MANIFEST_FILE, CARD_FILE])
        for file, text in ((MANIFEST_FILE, report.previous_manifest), (CARD_FILE, report.previous_card)):
            if text is not None:
                atomic_write(staging / file, text)
    return report


def unlocking(reader: CheckpointReader, report: EncryptReport, key: Key) -> Mapping[str, Scaling]:
    """What an encrypted checkpoint's tensors were multiplied by.

    Raises:
        EncryptError: another key, or tensors that the manifest does not know.
    """
    if key.fingerprint != report.key_fingerprint:
        raise EncryptError(
            f"{reader.folder}: was encrypted with another key (its fingerprint is {report.key_fingerprint[:16]}…, this "
            f"one's {key.fingerprint[:16]}…)"
        )
    if reader.tensors.keys() != report.tensors.keys():
        differing = sorted(reader.tensors.keys() ^ report.tensors.keys())[0]
        raise EncryptError(f"{reader.folder}: not the checkpoint that was encrypted: {differing} is not in both")
    traps = Traps(**report.traps.model_dump())
    return scalings(_sites(reader), lambda site: traps.exponents(key, site))


def check_digest(model: Path, tensor: str, found: str | None, expected: str) -> None:
    """Raise `EncryptError` if a decrypted tensor is not the one that was encrypted."""
    if found != expected:
        raise EncryptError(
            f"{model}: {tensor} is not the tensor that was encrypted: the file was changed afterwards; "
            "get the checkpoint from its publisher again"
        )


class _Rescaled:
    """One tensor on its way: hashed as it was (or as it becomes, on the way back), and multiplied."""

    whole = False

    def __init__(self, scaling: Scaling | None, inverse: bool, done: Callable[[str], None]) -> None:
        self._scaling = scaling
        self._inverse = inverse
        self._done = done
        self._digest = blake3()

    def piece(self, rows: Tensor, start: int) -> Tensor:
        if not self._inverse:
            self._update(rows)
        if self._scaling is not None:
            self._scaling.apply(rows, start, inverse=self._inverse)
        if self._inverse:
            self._update(rows)
        return rows

    def _update(self, rows: Tensor) -> None:
        self._digest.update(rows.flatten().view(torch.uint8).numpy().data)

    def done(self) -> None:
        self._done(self._digest.hexdigest())


def _rewrite(
    reader: CheckpointReader,
    staging: Path,
    by_tensor: Mapping[str, Scaling],
    workers: int,
    progress: Progress | None,
    *,
    inverse: bool,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write all files; digests of the plain tensors (BLAKE3) and of the files that were written (SHA-256)."""
    digests: dict[str, str] = {}
    total = sum(info.n_bytes for info in reader.tensors.values())
    done, lock = 0, Lock()

    def rewrite(info: TensorInfo) -> _Rescaled:
        return _Rescaled(by_tensor.get(info.name), inverse, lambda digest: digests.__setitem__(info.name, digest))

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
        raise by_tensor[name].explain(reader.read(name), inverse=inverse) from error
    if reader.index is not None:
        atomic_write(staging / INDEX_FILE, reader.index)
    return {name: digests[name] for name in reader.tensors}, dict(files)


def _sites(reader: CheckpointReader) -> list[Site]:
    return find_sites(reader.config, {name: info.shape for name, info in reader.tensors.items()})


def _refuse(reader: CheckpointReader) -> None:
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


def _text(reader: CheckpointReader, name: str) -> str | None:
    path = reader.file(name)
    try:
        return path.read_bytes().decode() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise EncryptError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _card_section(report: EncryptReport) -> str:
    return (
        "## Protected against quantization\n\n"
        f"The weights of this checkpoint were rewritten by optimum-qguard {report.package_version} so that it computes "
        "exactly what the original does, bit for bit, in the precision it is stored in, and standard post-training "
        "quantization breaks it. Please use it as it is; to quantize it, ask its publisher, who has the key "
        f"(fingerprint `{report.key_fingerprint[:16]}`). This is no encryption of the content: anybody can run the "
        f"model. Details: `{MANIFEST_FILE}`.\n"
    )
