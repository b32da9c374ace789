"""A model to measure: as it is, or quantized while it is loaded, with or without guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.text import standard_library_text
from optimum_qguard.guard.architecture import model_class, refuse_quantized
from optimum_qguard.guard.backends import backend_of, preset
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CALIBRATION_TEXTS = 32
_CALIBRATION_CHARACTERS = 2000


def load_model(
    model: str | Path, format: str | None = None, *, guard: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Args:
        model: a folder, or a Hub id with optional ``@revision``; quantized already only without ``format``.
        format: one of guard's `preset_names`, to quantize to; None leaves the model as it is.
        guard: randomize that quantization.

    Raises:
        CheckpointError: the model cannot be read.
        QGuardConfigError: an unknown format, or its library is not installed.
        QGuardError: it is quantized already, or cannot be guarded.
        EvaluationError: ``guard`` without a format, no tokenizer, or the model does not load.
    """
    if guard and format is None:
        raise EvaluationError("guard randomizes the rounding to a format, and none is given")
    config = None if format is None else preset(format)
    reader = open_checkpoint(model)
    if config is not None:
        refuse_quantized(reader)
        if backend_of(config).calibrates:
            config.dataset = _calibration_texts()
            config.tokenizer = str(reader.folder)
        if guard:
            config = QGuardConfig(config)
    tokenizer = _tokenizer(reader)
    _, found = model_class(reader)
    if not found.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise EvaluationError(f"{model}: is a {found.__name__}, which does not predict text")
    try:
        loaded = found.from_pretrained(
            reader.folder,
            quantization_config=config,
            dtype="auto",
            device_map="auto" if torch.accelerator.is_available() else "cpu",
        )
    except (QGuardError, QGuardConfigError):
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise EvaluationError(f"{model}: was not loaded: {error}") from error
    return loaded, tokenizer


def _tokenizer(reader: CheckpointReader) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(reader.folder)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{reader.folder}: has no tokenizer that transformers can load: {error}") from error


def _calibration_texts() -> list[str]:
    text = standard_library_text(_CALIBRATION_TEXTS * _CALIBRATION_CHARACTERS, "training")
    starts = range(0, len(text), _CALIBRATION_CHARACTERS)
    return [text[start : start + _CALIBRATION_CHARACTERS] for start in starts]
