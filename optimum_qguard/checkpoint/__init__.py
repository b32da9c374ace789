"""Reads and writes safetensors checkpoints tensor by tensor: local folders, sharded files, Hub repositories.

    >>> from optimum_qguard.checkpoint import open_checkpoint, transform_checkpoint
    >>> reader = open_checkpoint("org/model")                                    # doctest: +SKIP
    >>> transform_checkpoint(reader, "out", lambda name, tensor: tensor)         # doctest: +SKIP

Imports nothing else of the package, never unpickles, and never leaves half a file under a final name.
"""

from __future__ import annotations

from optimum_qguard.checkpoint.atomic import atomic_write
from optimum_qguard.checkpoint.card import merge_card
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.header import TensorInfo
from optimum_qguard.checkpoint.reader import CheckpointReader, open_checkpoint
from optimum_qguard.checkpoint.writer import transform_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "TensorInfo",
    "atomic_write",
    "merge_card",
    "open_checkpoint",
    "transform_checkpoint",
]
