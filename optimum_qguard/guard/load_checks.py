"""What a load must satisfy, and how it says that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import read_header
from optimum_qguard.guard.errors import QGuardError

_FULL_PRECISION = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def not_loaded(error: Exception, *names: str) -> QGuardError:
    """What `error` says, in one line, and of which tensors if it does not say that itself."""
    said = " ".join(str(error).split()) or type(error).__name__
    about = "" if not names or any(name in said for name in names) else f"{', '.join(names)}: "
    return QGuardError(f"the model was not loaded: {about}{said}")


def is_quantized(model: nn.Module, name: str) -> bool:
    """Whether the parameter is no longer a plain full-precision one."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        return True
    return type(parameter) is not nn.Parameter or parameter.dtype not in _FULL_PRECISION


def check_files(files: Sequence[str] | None) -> None:
    """Of a truncated file transformers would say neither its name nor what to do."""
    for file in files or ():
        if str(file).endswith(".safetensors"):
            try:
                read_header(Path(file))
            except CheckpointError as error:
                raise not_loaded(error) from error
