"""Which tensor of a loaded model each tensor of its checkpoint is.

Names differ where a checkpoint was saved without the prefix of the base model, where two tensors are tied, and where
transformers puts several tensors (of experts, for instance) together while loading.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.checkpoint.spelling import spellings
from optimum_qguard.repair.errors import RepairError


def stored_tensors(model: Any, reader: CheckpointReader) -> dict[str, Tensor]:
    """The model's tensors as they are now, by the checkpoint's names; what the checkpoint has beside them is left out.

    Some may be copies.

    Args:
        model: loaded from that checkpoint by ``from_pretrained``.

    Raises:
        RepairError: the model has a parameter that the checkpoint does not have.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    found, elsewhere = {}, {}
    for name, tensor in state.items():
        names = spellings(name, model)
        stored = next((each for each in names if each in reader and reader.tensors[each].shape == tensor.shape), None)
        if stored is None:
            elsewhere[name] = tensor
        else:
            found[stored] = tensor
    buffers = {name for name, _ in model.named_buffers()}
    addresses = {tensor.data_ptr() for tensor in found.values()}
    for name, tensor in elsewhere.items():
        if name not in buffers and tensor.data_ptr() not in addresses:
            raise RepairError(
                f"{reader.folder}: has no tensor {name} of shape {tuple(tensor.shape)}, which the model needs"
            )
    return found
