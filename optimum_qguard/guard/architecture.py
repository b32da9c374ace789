"""The transformers class of a checkpoint, and its modules without their weights."""

from __future__ import annotations

from typing import Any

import torch

from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.checkpoint.spelling import spellings
from optimum_qguard.guard.errors import QGuardError


def model_class(reader: CheckpointReader) -> tuple[Any, Any]:
    """The configuration, and the class that ``config.json`` names under ``architectures``.

    Code that comes with a checkpoint is never run.

    Raises:
        QGuardError: no usable ``config.json``, or a class that transformers does not have.
    """
    import transformers

    if not reader.config:
        raise QGuardError(f"{reader.folder}: has no config.json; name the folder of a transformers model")
    try:
        config = transformers.AutoConfig.from_pretrained(reader.folder)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise QGuardError(
            f"{reader.folder}: config.json does not describe a model that transformers {transformers.__version__} "
            f"knows (model_type {reader.config.get('model_type')!r}): {error}; update transformers, or correct the file"
        ) from error
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise QGuardError(
            f"{reader.folder}: config.json names the architecture {', '.join(names) or '(none)'}, which transformers "
            f"{transformers.__version__} does not have; code that comes with a checkpoint is not run"
        )
    return config, found


def skeleton(reader: CheckpointReader) -> Any:
    """The model on the meta device: every module, no weights.

    Raises:
        QGuardError: see `model_class`; or a model that cannot be built.
    """
    config, found = model_class(reader)
    try:
        with torch.device("meta"):
            return found(config)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise QGuardError(
            f"{reader.folder}: config.json describes a {found.__name__} that cannot be built ({error}); get the file "
            "from its publisher again"
        ) from error


def names_in_model(model: Any, reader: CheckpointReader) -> dict[str, str]:
    """What the model's parameters are called in it, by the checkpoint's names, which may lack the prefix of the base
    model (GPT-2's do) or have it where the model has none. Tensors that are merged on loading are left out."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name in reader.tensors:
        if (match := next((each for each in spellings(name, model) if each in own), None)) is not None:
            found[name] = match
    return found


def refuse_protected(name: str, manifest: dict[str, Any] | None) -> None:
    """Raise `QGuardError` with the publisher's notice if there is a manifest of a checkpoint that was encrypted against
    quantization: it breaks, guarded or not."""
    if manifest is not None:
        raise QGuardError(
            f"{name} is protected against quantization. {manifest.get('notice', '')} With the key, load it with "
            "QGuardUnlockConfig, or turn it back with qguard decrypt"
        )


def refuse_quantized(reader: CheckpointReader) -> None:
    """Raise `QGuardError` if the checkpoint's weights are quantized already."""
    config = reader.quantization_config
    if config is not None:
        raise QGuardError(
            f"{reader.folder}: is quantized already ({config.get('quant_method', 'unknown method')}); name its "
            "full-precision original"
        )
