"""`QGuardUnlockConfig`: whoever has the key loads an encrypted checkpoint quantized, decrypted tensor by tensor.

transformers reads checkpoints through ``safetensors.safe_open``. While a model with this configuration is loaded, the
files of its checkpoint (and only they, in this thread) are opened through a proxy that undoes what encryption did to
each tensor, and checks it against the manifest. Nothing decrypted is written anywhere.
Written against transformers 5.23.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from blake3 import blake3
from torch import Tensor
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.protection import UNLOCKED, protection_of
from optimum_qguard.encrypt.change import Change
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.manifest import EncryptReport, read_manifest
from optimum_qguard.encrypt.scaling import InexactError
from optimum_qguard.encrypt.transform import changed_since, check_digest, unlocking

QUANT_METHOD = "qguard-unlock"
_WEIGHTS_AT_A_TIME = 1 << 18

_safe_open: Any = safetensors.safe_open


class QGuardUnlockConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Decrypt while loading, then quantize as ``quantization_config`` says (which may be a `QGuardConfig`).

    Args:
        quantization_config: any configuration that quantizes on load.
        key: the key, or its file. It is not part of `to_dict`.

    Raises:
        EncryptError: the key's file cannot be read.
    """

    def __init__(
        self, quantization_config: QuantizationConfigMixin, *, key: Key | str | Path, quant_method: str = QUANT_METHOD
    ) -> None:
        if quant_method != QUANT_METHOD or not isinstance(quantization_config, QuantizationConfigMixin):
            raise EncryptError(
                "QGuardUnlockConfig takes one of transformers' quantization configurations, for example "
                "BitsAndBytesConfig(load_in_8bit=True), and the key"
            )
        self.quant_method = QUANT_METHOD
        self.quantization_config = quantization_config
        self._key = key if isinstance(key, Key) else Key.load(key)

    def to_dict(self) -> dict[str, Any]:
        """Without the key."""
        return {"quant_method": QUANT_METHOD, "quantization_config": self.quantization_config.to_dict()}


class QGuardUnlockQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers finds under ``quant_method="qguard-unlock"``: the library's own quantizer, reading through a
    proxy while it loads."""

    def __new__(cls, quantization_config: QGuardUnlockConfig, *, pre_quantized: bool = False, **kwargs: Any) -> Any:
        if pre_quantized:
            raise EncryptError(
                f"config.json names {QUANT_METHOD!r} as its quantization method, which no saved model has: the file "
                "was edited; get the checkpoint from its publisher again"
            )
        quantizer = AutoHfQuantizer.from_config(quantization_config.quantization_config, pre_quantized=False, **kwargs)
        preprocess, postprocess = quantizer.preprocess_model, quantizer.postprocess_model

        def preprocess_model(model: Any, **arguments: Any) -> None:
            quantizer.preprocess_model, quantizer.postprocess_model = preprocess, postprocess_model
            model.config.quantization_config = quantizer.quantization_config
            _begin(model, arguments.get("checkpoint_files"), quantization_config._key)
            preprocess(model=model, **arguments)

        def postprocess_model(model: Any, **arguments: Any) -> Any:
            quantizer.postprocess_model = postprocess
            _end()
            delattr(model, UNLOCKED)
            return postprocess(model, **arguments)

        quantizer.preprocess_model = preprocess_model
        return quantizer


class _Reading(threading.local):
    """The files that this thread opens through the proxy."""

    files: Mapping[Path, tuple[EncryptReport, Mapping[str, Change]]] = {}


_reading = _Reading()


def _begin(model: Any, files: Any, key: Key) -> None:
    found = protection_of(model, files)
    if found is None:
        raise EncryptError(
            f"{model.name_or_path}: no encrypted checkpoint, so there is nothing to unlock; load it with the "
            "quantization configuration alone"
        )
    reader = open_checkpoint(Path(str(files[0])).parent)
    report = read_manifest(reader, found[0])
    # transformers builds models under torch.device("meta"), where a tensor made on the way would hold nothing.
    with torch.device("cpu"):
        changes = unlocking(reader, report, key)
    setattr(model, UNLOCKED, True)
    _reading.files = {Path(str(file)).resolve(): (report, changes) for file in files}
    # Should loading fail: not to be decrypted when it is loaded another time.
    weakref.finalize(model, _end)
    for module in ("transformers.modeling_utils", "safetensors"):
        sys.modules[module].safe_open = _open  # type: ignore[attr-defined]


def _end() -> None:
    _reading.files = {}


def _open(file: Any, *arguments: Any, **options: Any) -> Any:
    opened = _safe_open(file, *arguments, **options)
    unlocked = _reading.files.get(Path(str(file)).resolve())
    return opened if unlocked is None else _File(opened, *unlocked)


class _File:
    """A safetensors file, decrypted as it is read."""

    def __init__(self, file: Any, report: EncryptReport, changes: Mapping[str, Change]) -> None:
        self._file = file
        self._report = report
        self._changes = changes

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._file.__exit__(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self, name)

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        mixed = self._report.mixed.get(name)
        if mixed is not None:
            self._check(name, blake3(_bytes(tensor)), mixed.digest)
            return self._undone(name, tensor, 0)
        digest = blake3()
        tensor = self._undone(name, tensor, 0, digest)
        self._check(name, digest, self._report.tensors[name])
        return tensor

    def rows(self, name: str, rows: slice) -> Tensor:
        """A range of rows, not checked unless all of the tensor is needed for them."""
        if name in self._report.mixed:
            return self.get_tensor(name)[rows]
        return self._undone(name, self._file.get_slice(name)[rows], rows.start or 0)

    def _undone(self, name: str, rows: Tensor, start: int, digest: Any = None) -> Tensor:
        """Decrypted, in memory of its own (another reader of the same file may get the same), a few rows at a time,
        so that each is in the processor's cache from copying to hashing."""
        change = self._changes.get(name)
        if change is None:
            if digest is not None:
                digest.update(_bytes(rows))
            return rows
        try:
            if change.mixes:
                return change.apply(rows.clone(), start, inverse=True)
            undone = torch.empty_like(rows, device=rows.device)
            step = max(1, _WEIGHTS_AT_A_TIME * len(rows) // max(rows.numel(), 1))
            for at in range(0, len(rows), step):
                piece = undone[at : at + step].copy_(rows[at : at + step])
                change.apply(piece, start + at, inverse=True)
                if digest is not None:
                    digest.update(_bytes(piece))
        except InexactError as error:
            raise changed_since(Path(self._report.model), name) from error
        return undone

    def _check(self, name: str, digest: Any, expected: str) -> None:
        check_digest(Path(self._report.model), name, str(digest.hexdigest()), expected)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class _Slice:
    """What ``get_slice`` gives."""

    def __init__(self, file: _File, name: str) -> None:
        self._file = file
        self._name = name
        self._slice = file._file.get_slice(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice) and index.step in (None, 1) and (index.start or 0) >= 0 and index != slice(None):
            return self._file.rows(self._name, index)
        tensor: Tensor = self._file.get_tensor(self._name)[index]
        return tensor


def register() -> None:
    """Make ``quant_method="qguard-unlock"`` known to transformers."""
    register_quantization_config(QUANT_METHOD)(QGuardUnlockConfig)
    register_quantizer(QUANT_METHOD)(QGuardUnlockQuantizer)


register()
