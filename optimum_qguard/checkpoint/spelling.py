"""What a tensor may be called: checkpoints may lack the base model's prefix, or have it where the model has none."""

from __future__ import annotations

from typing import Any


def spellings(name: str, model: Any) -> tuple[str, str, str]:
    """A tensor's or module's name as it is, with the prefix of the base model, and without it.

    Args:
        name: in the checkpoint, to find it in the model; or the other way round.
        model: of transformers; another module's has no prefix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, prefix + name, name.removeprefix(prefix)
