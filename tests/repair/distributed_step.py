"""A process of a test: trains a small model for three steps, sharded by FSDP 2 or replicated (DDP).

Process 0 writes its weights and the distance from the anchor.

    torchrun ... distributed_step.py KIND ANCHOR OUT
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_anchor import EXAMPLES, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from optimum_qguard import AnchorCallback


def steps(model: Any, examples: list[list[dict[str, torch.Tensor]]], anchor: str, *, decoupled: bool) -> float:
    """Train on the mean over each entry's examples; return the distance."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    callback = AnchorCallback(anchor, strength=2.0 if decoupled else 300.0, decoupled=decoupled)
    tell = (SimpleNamespace(), None, None)
    callback.on_train_begin(*tell, model=model, optimizer=optimizer)
    for batch in examples:
        optimizer.zero_grad()
        for example in batch:
            (model(**{name: row[None] for name, row in example.items()}).loss / len(batch)).backward()
        callback.on_pre_optimizer_step(*tell, model=model, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(*tell, model=model, optimizer=optimizer)
    assert callback.anchor is not None
    return callback.anchor.distance(model)


def main(kind: str, anchor: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    weights: dict[str, torch.Tensor] = {}
    for decoupled in (False, True):
        model: Any = llama()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        batches = [[EXAMPLES[2 * step + rank]] for step in range(3)]
        weights[f"{decoupled}.distance"] = torch.tensor(steps(model, batches, anchor, decoupled=decoupled))
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[f"{decoupled}.{name.removeprefix('module.')}"] = whole.detach().clone()
    if rank == 0:
        save_file(weights, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
