"""A process of a test: `AnchorTrainer` in several processes, replicated (DDP) or sharded (FSDP 2) by accelerate.

Process 0 writes the weights and the distance that was logged last, of a coupled and of a decoupled anchor.

    torchrun ... launched.py KIND ANCHOR OUT
"""

import sys
import tempfile
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from test_anchor import STRENGTH, llama, train
from torch.distributed.tensor import DTensor

from optimum_qguard import AnchorTrainer

FSDP2: dict[str, Any] = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


class ShardingTrainer(AnchorTrainer):
    """accelerate shards on GPUs only; told that there are some, it does so with gloo, too."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def main(kind: str, anchor: str, out: str) -> None:
    written: dict[str, torch.Tensor] = {}
    for decoupled in (False, True):
        trainer = train(
            llama(),
            tempfile.mkdtemp(),
            trainer=ShardingTrainer if kind == "fsdp2" else AnchorTrainer,
            anchor=anchor,
            anchor_strength=2.0 if decoupled else STRENGTH,
            anchor_decoupled=decoupled,
            **(FSDP2 if kind == "fsdp2" else {}),
        )
        assert trainer.accelerator.num_processes == 2
        named = dict(trainer.model_wrapped.named_parameters())
        assert all(isinstance(parameter, DTensor) == (kind == "fsdp2") for parameter in named.values())
        for name, parameter in named.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            written[f"{decoupled}.{name.removeprefix('module.')}"] = whole.detach().clone()
        logged = [entry for entry in trainer.state.log_history if "anchor_distance" in entry][-1]
        written[f"{decoupled}.distance"] = torch.tensor(logged["anchor_distance"], dtype=torch.float64)
    if PartialState().is_main_process:
        save_file(written, out)
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
