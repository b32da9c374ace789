"""The checkpoint to repair: what of it cannot be, and its tokenizer and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, protection
from optimum_qguard.repair.errors import RepairError


def check_source(model: str | Path, reader: CheckpointReader, block_size: int) -> None:
    """Raise `RepairError` for a checkpoint that cannot be trained, or not in blocks of that many tokens.

    Args:
        model: its name, for the error.
    """
    quantized = reader.quantization_config
    if quantized is not None:
        raise RepairError(
            f"{reader.folder}: is quantized already ({quantized.get('quant_method', 'unknown method')}), so it cannot "
            "be trained; name its full-precision original"
        )
    if protection(reader.file(MANIFEST_FILE)) is not None:
        raise RepairError(
            f"{model}: is protected against quantization, and trained it could not be turned back; turn it back first "
            "with qguard decrypt"
        )
    positions = reader.config.get("max_position_embeddings", reader.config.get("n_positions"))
    if isinstance(positions, int) and block_size > positions:
        raise RepairError(f"block size is {block_size}, and the model reads {positions} tokens; give at most that many")


def load_tokenizer(reader: CheckpointReader) -> Any:
    """The checkpoint's tokenizer; `RepairError` if it has none that transformers can load."""
    try:
        return transformers.AutoTokenizer.from_pretrained(reader.folder, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise RepairError(f"{reader.folder}: has no tokenizer that transformers can load: {error}") from error


def load_model(reader: CheckpointReader) -> Any:
    """The checkpoint as a causal language model in float32; `RepairError` if it is none."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            reader.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file makes transformers raise anything
        raise RepairError(f"{reader.folder}: was not loaded as a causal language model: {error}") from error


def check_vocabulary(model: Any, blocks: Tensor) -> None:
    """Raise `RepairError` if there are tokens that the model does not know."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(blocks.max()) >= vocabulary:
        raise RepairError(
            f"the tokenizer gave token {int(blocks.max())}, and the model knows {vocabulary}: they are of two models"
        )
