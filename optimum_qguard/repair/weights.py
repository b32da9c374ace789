"""A weight that is trained near a clean one: on its own, in shards of FSDP 2, or as the sum of a frozen weight and
adapters (LoRA).

Each works in pieces that stay in the cache, and in float32, whatever the dtypes of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from optimum_qguard.formats.scratch import CHUNK_WEIGHTS, Scratch
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.modules import Layer

_CHUNK_ON_ACCELERATOR = 1 << 24


class PlainWeight:
    """The weight of a linear layer, or of experts."""

    def __init__(self, module: nn.Module, parameter: str = "weight") -> None:
        self.weight: Any = getattr(module, parameter)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight, as it is stored."""
        return tuple(self.weight.shape)

    @property
    def trained(self) -> bool:
        return bool(self.weight.requires_grad)

    def add_gradient(self, clean: Tensor, factor: float) -> None:
        """Add ``factor (W - clean)`` to the gradient, if there is one."""
        if self.weight.grad is None:
            return
        scratch = Scratch()
        for gradient, current, near in self._pieces(_local(self.weight.grad), clean):
            difference = scratch.like(current, "difference").copy_(near)
            torch.sub(current, difference, out=difference)
            gradient.add_(difference, alpha=factor)

    def pull(self, clean: Tensor, share: float) -> None:
        """``W ← W - share (W - clean)``."""
        scratch = Scratch()
        for weight, current, near in self._pieces(_local(self.weight), clean):
            difference = scratch.like(current, "difference").copy_(near)
            if weight.dtype == torch.float32:
                weight.lerp_(difference, share)
            else:
                weight.sub_(torch.sub(current, difference, out=difference), alpha=share)

    def square(self, clean: Tensor) -> Tensor:
        """Σ (W - clean)² of this process's part, a float64 scalar."""
        scratch = Scratch()
        total = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        for current, near in self._pieces(clean):
            difference = scratch.like(current, "difference").copy_(near)
            total += torch.sub(current, difference, out=difference).square_().sum(dtype=torch.float64)
        return total

    def _pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Pieces of some tensors, of the weight, and of the clean weight, which comes last."""
        *others, clean = tensors
        weight = _local(self.weight)
        flat = [tensor.reshape(-1) for tensor in (*others, weight, _shard_like(clean, self.weight))]
        chunk = CHUNK_WEIGHTS if weight.device.type == "cpu" else _CHUNK_ON_ACCELERATOR
        for start in range(0, weight.numel(), chunk):
            yield tuple(tensor[start : start + chunk] for tensor in flat)


class LoraWeight:
    """The sum of a frozen weight and its active adapters, ``W = W_base + Σ s B A``: the weight that merging would give.

    With ``G`` the gradient at W, those at the adapters are ``s G Aᵀ`` at B and ``s Bᵀ G`` at A.
    """

    def __init__(self, name: str, layer: Any) -> None:
        """Raises `RepairError` if an adapter does something else than add a product, or is merged already."""
        if layer.merged:
            raise RepairError(f"{name}: its adapters are merged, so they are not trained; unmerge them first")
        self._base = layer.base_layer.weight
        self._transposed = layer.fan_in_fan_out
        self._adapters = [each for each in layer.active_adapters if each in layer.lora_A]
        for adapter in self._adapters:
            if adapter in layer.lora_variant:
                kind = type(layer.lora_variant[adapter]).__name__
                raise RepairError(f"{name}: its adapter is of the kind {kind}; an anchor holds plain LoRA only")
        self._layer = layer
        if any(isinstance(tensor, DTensor) for tensor in (self._base, *layer.parameters())):
            raise RepairError(
                f"{name}: an anchor does not hold adapters whose weights are sharded (FSDP); use several processes "
                "without sharding (DDP), or train the full weights"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight, as it is stored."""
        return tuple(self._base.shape)

    @property
    def trained(self) -> bool:
        return any(up.requires_grad or down.requires_grad for _, up, down in self._products())

    def add_gradient(self, clean: Tensor, factor: float) -> None:
        """Add the gradients that ``factor (W - clean)`` at W means for the adapters."""
        for rows, difference in self._differences(clean):
            for scale, up, down in self._products():
                if up.grad is not None:
                    up.grad[rows] += (factor * scale * (difference @ down.float().T)).to(up.grad.dtype)
                if down.grad is not None:
                    down.grad += (factor * scale * (up[rows].float().T @ difference)).to(down.grad.dtype)

    def square(self, clean: Tensor) -> Tensor:
        """Σ (W - clean)², a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self._base.device)
        for _, difference in self._differences(clean):
            total += difference.square_().sum(dtype=torch.float64)
        return total

    def _products(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Of each adapter its scale, B ``(out, rank)`` and A ``(rank, in)``."""
        layer = self._layer
        for name in self._adapters:
            yield layer.scaling[name], layer.lora_B[name].weight, layer.lora_A[name].weight

    def _differences(self, clean: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows (of ``(out, in)``), and ``W - clean`` there."""
        base, near = (self._base.T, clean.T) if self._transposed else (self._base, clean)
        chunk = CHUNK_WEIGHTS if base.device.type == "cpu" else _CHUNK_ON_ACCELERATOR
        n_rows = max(1, chunk // base.shape[1])
        for start in range(0, base.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            difference = base[rows].float() - near[rows].to(base.device).float()
            for scale, up, down in self._products():
                difference.addmm_(up[rows].float(), down.float(), alpha=scale)
            yield rows, difference


Weight = PlainWeight | LoraWeight


def weight_of(name: str, layer: Layer) -> Weight:
    """The weight of a layer, with or without adapters.

    Raises:
        RepairError: adapters that are not LoRA on a linear layer; a weight that is sharded in a way that is not
            FSDP 2's.
    """
    module = layer.module
    if not hasattr(module, "base_layer"):
        weight = PlainWeight(module, layer.parameter)
        if isinstance(weight.weight, DTensor) and not all(
            type(placement) in (Shard, Replicate) for placement in weight.weight.placements
        ):
            raise RepairError(f"{name}: is placed as {weight.weight.placements}; an anchor knows plain shards only")
        return weight
    if type(module).__name__ == "ParamWrapper":
        raise RepairError(f"{name}: has adapters on experts; an anchor holds LoRA on linear layers only")
    if not hasattr(module, "lora_A"):
        raise RepairError(f"{name}: has adapters of the kind {type(module).__name__}; an anchor holds plain LoRA only")
    return LoraWeight(name, module)


def reduce_squares(weights: list[Weight], squares: list[Tensor]) -> list[float]:
    """Sums over each whole weight, of sums over this process's parts."""
    sharded: dict[tuple[Any, int], list[int]] = {}
    for index, weight in enumerate(weights):
        if isinstance(weight, PlainWeight) and isinstance(weight.weight, DTensor):
            for dim, placement in enumerate(weight.weight.placements):
                if isinstance(placement, Shard):
                    sharded.setdefault((weight.weight.device_mesh, dim), []).append(index)
    for (mesh, dim), indices in sharded.items():
        sums = torch.stack([squares[index] for index in indices])
        torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        for index, total in zip(indices, sums, strict=True):
            squares[index] = total
    return [float(square) for square in squares]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_like(clean: Tensor, weight: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of a weight: a view."""
    if not isinstance(weight, DTensor):
        return clean
    coordinate = weight.device_mesh.get_coordinate()
    if coordinate is None:
        raise RepairError("this process has no part of the model")
    for dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            shards = clean.chunk(weight.device_mesh.size(dim), placement.dim)
            index = coordinate[dim]
            clean = shards[index] if index < len(shards) else clean.narrow(placement.dim, 0, 0)
    return clean
