"""A checkpoint as users will run it: at full precision, or quantized by its library, with or without guard."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.text import standard_library_text
from optimum_qguard.guard.architecture import model_class, refuse_quantized
from optimum_qguard.guard.backends import backend_of, preset, preset_names
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_TEXTS = 32
_CALIBRATION_CHARACTERS = 2000


def load_model(
    model: str | Path,
    format: str | None = None,
    *,
    guard: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    **arguments: Any,
) -> Any:
    """A causal language model.

    A library's preset (``bnb-int8``) is quantized and run by the library. Any other format (``gguf-q4_k_m``, ``nf4``)
    is quantized by `optimum_qguard.formats`, symbol for symbol as its quantizer does it, and run on the decoded values.

    Args:
        model: a folder, or a Hub id with optional ``@revision``; quantized already only without ``format``.
        format: see `known_formats`; ``None`` leaves the model as it is.
        guard: options of `QGuardConfig` to randomize that quantization, empty for its defaults; ``None``: no guard.
        dtype: of what is not quantized; the checkpoint's by default.
        device: where it runs; an accelerator by default, if there is one.
        arguments: of the preset. One that calibrates gets the checkpoint's tokenizer, and unless a ``dataset`` is given
            pages of the standard library's documentation.

    Raises:
        CheckpointError: the model cannot be read.
        QGuardConfigError: an unknown format, or its library is not installed.
        QGuardError: it is quantized already, or cannot be guarded.
        WeightError: weights that the format refuses.
        EvaluationError: ``guard`` without a format, or the model does not load or does not predict text.
    """
    if format is None or format in preset_names():
        return _load(model, format, guard, dtype, device, arguments)
    reader = open_checkpoint(model)
    find_targets(reader, format)
    if guard is None:
        return _decoded(_load(model, None, None, dtype, device, {}), reader, format)
    with tempfile.TemporaryDirectory(prefix="qguard-") as folder:
        guarded = Path(folder) / "guarded"
        report = guard_checkpoint(model, guarded, format, **guard)
        loaded = _decoded(_load(guarded, None, None, dtype, device, {}), open_checkpoint(guarded), format)
    loaded.qguard_report = report
    return loaded


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        CheckpointError: the model cannot be read.
        EvaluationError: it has none.
    """
    from transformers import AutoTokenizer

    folder = open_checkpoint(model).folder
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise EvaluationError(f"{folder}: has no tokenizer that transformers can load: {error}") from error
    return found


def _load(
    model: str | Path,
    format: str | None,
    guard: Mapping[str, Any] | None,
    dtype: torch.dtype | str,
    device: str | None,
    arguments: dict[str, Any],
) -> Any:
    if guard is not None and format is None:
        raise EvaluationError("guard randomizes the rounding to a format, and none is given")
    config = None if format is None else preset(format, **arguments)
    reader = open_checkpoint(model)
    if config is not None:
        refuse_quantized(reader)
        if backend_of(config).calibrates:
            config.dataset = _calibration_texts() if config.dataset is None else config.dataset
            config.tokenizer = str(reader.folder)
        if guard is not None:
            config = QGuardConfig(config, **guard)
    _, found = model_class(reader)
    if not found.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise EvaluationError(f"{model}: is a {found.__name__}, which does not predict text")
    everywhere = "auto" if torch.accelerator.is_available() else "cpu"
    try:
        loaded = found.from_pretrained(
            reader.folder,
            quantization_config=config,
            dtype=dtype,
            device_map=everywhere if device is None else {"": device},
        )
    except (QGuardError, QGuardConfigError):
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise EvaluationError(f"{model}: was not loaded: {error}") from error
    return loaded.eval()


def _calibration_texts() -> list[str]:
    text = standard_library_text(_CALIBRATION_TEXTS * _CALIBRATION_CHARACTERS, "training")
    starts = range(0, len(text), _CALIBRATION_CHARACTERS)
    return [text[start : start + _CALIBRATION_CHARACTERS] for start in starts]


@torch.no_grad()
def _decoded(model: Any, reader: CheckpointReader, format: str) -> Any:
    """``model`` with each weight that ``format`` quantizes replaced by what inference will see."""
    for name, target in find_targets(reader, format).items():
        parameter = model.get_parameter(name)
        weight = target.oriented(parameter.data)
        parameter.data = target.oriented(target.format.quantize(weight, name).dequantize()).to(parameter.dtype)
    return model
