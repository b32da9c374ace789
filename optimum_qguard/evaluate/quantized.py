"""A checkpoint as users will run it: quantized by its library, with or without guard."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.evaluate.text import standard_library_text
from optimum_qguard.guard.architecture import model_class, refuse_quantized
from optimum_qguard.guard.backends import preset, preset_names
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.quantize import calibrates
from optimum_qguard.guard.targets import find_targets

_PAGES = 16
_PAGE_CHARACTERS = 2000


def load_full_precision(model: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The model of a checkpoint, not quantized.

    Raises:
        CheckpointError, QGuardError: it cannot be read, is quantized already, or is of an unknown architecture.
    """
    reader = open_checkpoint(model)
    refuse_quantized(reader)
    _, found = model_class(reader)
    return found.from_pretrained(reader.folder, dtype=dtype, device_map={"": device})


def load_quantized(
    model: str | Path,
    format: str,
    *,
    guard: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **arguments: Any,
) -> Any:
    """The model of a checkpoint, quantized.

    A library's preset (``bnb-int8``) is quantized and run by the library. Anything else (``gguf-q4_k_m``, ``nf4``) is
    quantized by `optimum_qguard.formats`, symbol for symbol as its quantizer does it, and run on the decoded values.

    Args:
        model: a folder, or a Hub id.
        format: see `known_formats`.
        guard: options of `QGuardConfig`, empty for its defaults; ``None``: no guard.
        dtype: of what is not quantized.
        device: where it runs.
        arguments: of the preset. One that calibrates gets the checkpoint's tokenizer, and unless a ``dataset`` is given
            a few pages of the standard library's documentation.

    Raises:
        CheckpointError, QGuardError, QGuardConfigError, WeightError: as `load_full_precision`, `find_targets`, guard.
    """
    if format in preset_names():
        reader = open_checkpoint(model)
        refuse_quantized(reader)
        if calibrates(format):
            arguments = {"dataset": _pages(), "tokenizer": str(reader.folder), **arguments}
        config = preset(format, **arguments)
        if guard is not None:
            config = QGuardConfig(config, **guard)
        _, found = model_class(reader)
        return found.from_pretrained(
            reader.folder, quantization_config=config, dtype=dtype, device_map={"": device}
        ).eval()
    if guard is None:
        return decode(load_full_precision(model, dtype=dtype, device=device), open_checkpoint(model), format)
    with tempfile.TemporaryDirectory(prefix="qguard-") as folder:
        guarded = Path(folder) / "guarded"
        report = guard_checkpoint(model, guarded, format, **guard)
        loaded = decode(load_full_precision(guarded, dtype=dtype, device=device), open_checkpoint(guarded), format)
    loaded.qguard_report = report
    return loaded


def _pages() -> list[str]:
    text = standard_library_text(_PAGES * _PAGE_CHARACTERS, "training")
    return [text[start : start + _PAGE_CHARACTERS] for start in range(0, len(text), _PAGE_CHARACTERS)]


@torch.no_grad()
def decode(model: Any, reader: CheckpointReader, format: str) -> Any:
    """Replace each weight of ``model`` that ``format`` quantizes by what inference will see; ``model`` itself."""
    for name, target in find_targets(reader, format).items():
        parameter = model.get_parameter(name)
        weight = target.oriented(parameter.data)
        parameter.data = target.oriented(target.format.quantize(weight, name).dequantize()).to(parameter.dtype)
    return model.eval()
