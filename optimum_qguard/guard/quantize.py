"""Quantize a checkpoint with one of transformers' libraries under guard, and save it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.origin import name_and_revision
from optimum_qguard.checkpoint.output import check_output, check_space, copy_other_files, output_folder
from optimum_qguard.checkpoint.reader import CONFIG_FILE
from optimum_qguard.guard.architecture import model_class, refuse_quantized
from optimum_qguard.guard.backends import backend_of, backends, preset
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.load_checks import not_loaded
from optimum_qguard.guard.report import GuardReport

DTYPES = ("auto", "bfloat16", "float16", "float32")


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str = "auto",
    group_size: int | None = None,
    calibration_texts: Sequence[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> GuardReport:
    """Load a model quantized under guard and save it with everything that lies beside its weights.

    Args:
        model: a folder, or a Hub id with optional ``@revision``.
        out: the output folder, there whole or not at all.
        format: one of `preset_names`.
        dtype: of what is not quantized, one of `DTYPES`; ``"auto"`` is the checkpoint's.
        group_size: for the formats that have one.
        calibration_texts: for a library that calibrates.
        overwrite: see `output_folder`.
        options: ``method``, ``noise``, ``multiplier``, ``compensate``, ``clip_outliers`` and ``seed`` as for
            `QGuardConfig`.

    Raises:
        QGuardConfigError: arguments that make no sense, an unknown format, a library that is not installed or whose
            models transformers cannot save.
        CheckpointError: the input cannot be read or the output not written.
        QGuardError: quantized already, NaN weights, or not to be guarded.
    """
    if dtype not in DTYPES:
        raise QGuardConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    config = QGuardConfig(_preset(format, group_size), **options)
    _refuse_unsavable(config.quantization_config, format)
    reader = open_checkpoint(model)
    refuse_quantized(reader)
    check_output(out, reader.folder, overwrite=overwrite)
    if backend_of(config.quantization_config).calibrates:
        if not calibration_texts:
            raise QGuardConfigError(f"{format} calibrates, so it needs calibration texts")
        config.quantization_config.dataset = list(calibration_texts)
        config.quantization_config.tokenizer = str(reader.folder)
    _, found = model_class(reader)
    try:
        loaded = found.from_pretrained(
            reader.folder,
            quantization_config=config,
            dtype=dtype,
            device_map="auto" if torch.accelerator.is_available() else "cpu",
        )
    except (QGuardError, QGuardConfigError):
        raise
    except Exception as error:  # a damaged config.json makes transformers raise anything
        raise not_loaded(error) from error
    name, revision = name_and_revision(model, reader)
    report: GuardReport = loaded.qguard_report.model_copy(update={"model": name, "revision": revision})
    loaded.qguard_report = report
    check_space(out, loaded.get_memory_footprint())
    with output_folder(out, reader.folder, overwrite=overwrite) as staging:
        copy_other_files(reader, staging, leave=(CONFIG_FILE,))
        loaded.save_pretrained(staging)
    return report


def calibrates(format: str) -> bool:
    """Whether the format's library needs calibration texts."""
    return any(backend.calibrates for backend in backends() if format in backend.presets)


def _preset(format: str, group_size: int | None) -> Any:
    if group_size is None:
        return preset(format)
    if group_size < 1 and group_size != -1:
        raise QGuardConfigError(f"group size is {group_size}; it is 1 or more, or -1 for whole rows")
    makes = [backend.presets[format] for backend in backends() if format in backend.presets]
    if makes and "group_size" not in inspect.signature(makes[0]).parameters:
        raise QGuardConfigError(f"{format} has no group size")
    return preset(format, group_size=group_size)


def _refuse_unsavable(config: Any, format: str) -> None:
    from transformers.quantizers import AutoHfQuantizer

    if not AutoHfQuantizer.from_config(config, pre_quantized=False).is_serializable():
        raise QGuardConfigError(
            f"transformers cannot save a model in {format}, so nothing was written; guard it while you load it: "
            f"from_pretrained(..., quantization_config=QGuardConfig({type(config).__name__}(...)))"
        )
