"""Where channels lie in a decoder layer's tensors: rows and columns of linears, heads in projections, rotary pairs.

Channels are int64 tensors that number a site's free factors; -1 stands for an entry that is left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from optimum_qguard.encrypt.errors import ArchitectureError

# Names of tensors and which channel each entry of them is on.
Channels = Iterator[tuple[str, Tensor]]
Role = Literal["query", "key", "value"]
Rotary = Literal["half", "interleaved", "none"]


@dataclass(frozen=True)
class Heads:
    """Numbers of an attention: query heads, the key-value heads that they are grouped on, dimensions of a head."""

    queries: int
    groups: int
    size: int

    def __post_init__(self) -> None:
        if self.queries % self.groups:
            raise ArchitectureError(f"{self.queries} query heads cannot share {self.groups} key-value heads")

    def per_query(self, per_group: Tensor) -> Tensor:
        """``per_group`` ``(groups, n)`` repeated for the query heads of each group: ``(queries, n)``."""
        return per_group.repeat_interleave(self.queries // self.groups, dim=0)


def heads_of(config: Any) -> Heads:
    """What most families read from a transformers configuration."""
    queries = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Heads(queries, getattr(config, "num_key_value_heads", None) or queries, size)


def ungrouped_heads_of(config: Any) -> Heads:
    """What families read that have a key-value head for every query head and no option for the size."""
    queries = config.num_attention_heads
    return Heads(queries, queries, config.hidden_size // queries)


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a checkpoint.

    Attributes:
        prefix: what its tensors' names begin with, as ``model.layers.0.``.
        config: the transformers configuration of the text model.
        heads: of its attention.
        shapes: of its tensors, by name without the prefix.
        transposed: whether linears are stored as ``(in, out)``, as GPT-2's Conv1D does.
    """

    prefix: str
    config: Any
    heads: Heads
    shapes: Mapping[str, tuple[int, ...]]
    transposed: bool = False

    def modules(self, pattern: str) -> list[str]:
        """Names of the modules here that ``pattern`` means, ``*`` being any one component; parameters that are no
        module's (fused experts) go by their own name."""
        if "*" not in pattern:
            return [pattern] if f"{pattern}.weight" in self.shapes or pattern in self.shapes else []
        matches = pattern_of(pattern).fullmatch
        return sorted({name.removesuffix(".weight") for name in self.shapes if matches(name.removesuffix(".weight"))})

    def weight(self, module: str) -> str:
        """Name of a module's weight, without the prefix.

        Raises:
            ArchitectureError: it is not in the checkpoint.
        """
        for name in (f"{module}.weight", module):
            if name in self.shapes:
                return name
        raise ArchitectureError(f"{self.prefix}{module}.weight is missing from the checkpoint")

    def vector(self, module: str, channels: Tensor) -> Channels:
        """Full name and channels of a norm's weight and bias; ``channels`` has as many entries as they."""
        weight = self.weight(module)
        for name in (weight, f"{module}.bias"):
            if name in self.shapes:
                shape = self.shapes[name]
                yield self._fitting(name, channels.view(shape) if channels.numel() == math.prod(shape) else channels)

    def rows(self, module: str, channels: Tensor) -> Channels:
        """Full name and channels of a linear's weight and bias; ``channels`` ``(out,)``, or ``(experts, out)`` for
        experts in one tensor."""
        yield self._fitting(self.weight(module), channels.unsqueeze(-2 if self.transposed else -1))
        if (bias := f"{module}.bias") in self.shapes:
            yield self._fitting(bias, channels)

    def columns(self, module: str, channels: Tensor) -> Channels:
        """Full name and channels of a linear's weight; ``channels`` ``(in,)``, or ``(experts, in)`` for experts in
        one tensor, each on channels of its own."""
        weight = self.weight(module)
        channels = channels.unsqueeze(-1 if self.transposed else -2)
        missing = len(self.shapes[weight]) - channels.dim()
        yield self._fitting(weight, channels.view((1,) * missing + channels.shape))

    def _fitting(self, name: str, channels: Tensor) -> tuple[str, Tensor]:
        """``name`` with the prefix and ``channels``, if they can be laid over that tensor.

        Raises:
            ArchitectureError: they cannot.
        """
        shape = self.shapes[name]
        if len(shape) != channels.dim() or any(c not in (1, n) for c, n in zip(channels.shape, shape, strict=True)):
            raise ArchitectureError(
                f"{self.prefix}{name} has shape {tuple(shape)}; the configuration and the other tensors of its layer "
                f"need {tuple(channels.shape)}, where 1 is any number"
            )
        return self.prefix + name, channels


def pattern_of(module: str) -> re.Pattern[str]:
    """``*`` in a module's name is any one component."""
    return re.compile(re.escape(module).replace(r"\*", "([^.]+)"))


class Projections(Protocol):
    """How query, key and value rows are stored."""

    def modules(self) -> tuple[str, ...]:
        """Names of the linears."""

    def rows(self, role: Role, heads: Heads) -> tuple[str, Tensor, int]:
        """The linear that holds that role, the rows ``(heads, size)`` in it, and how many rows it has in all."""


@dataclass(frozen=True)
class Separate:
    """Three linears."""

    query: str
    key: str
    value: str

    def modules(self) -> tuple[str, ...]:
        return self.query, self.key, self.value

    def rows(self, role: Role, heads: Heads) -> tuple[str, Tensor, int]:
        count = heads.queries if role == "query" else heads.groups
        total = count * heads.size
        return getattr(self, role), torch.arange(total).view(count, heads.size), total


@dataclass(frozen=True)
class Stacked:
    """One linear: all queries, then all keys, then all values."""

    module: str

    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    def rows(self, role: Role, heads: Heads) -> tuple[str, Tensor, int]:
        every = torch.arange((heads.queries + 2 * heads.groups) * heads.size)
        values = heads.queries + heads.groups
        heads_of_role = {
            "query": slice(heads.queries),
            "key": slice(heads.queries, values),
            "value": slice(values, None),
        }
        return self.module, every.view(-1, heads.size)[heads_of_role[role]], len(every)


@dataclass(frozen=True)
class Grouped:
    """One linear: for each key-value head its query heads, its key, its value."""

    module: str

    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    def rows(self, role: Role, heads: Heads) -> tuple[str, Tensor, int]:
        per_group = heads.queries // heads.groups
        every = torch.arange(heads.groups * (per_group + 2) * heads.size)
        within = {"query": slice(-2), "key": slice(-2, -1), "value": slice(-1, None)}[role]
        rows = every.view(heads.groups, per_group + 2, heads.size)[:, within]
        return self.module, rows.reshape(-1, heads.size), len(every)


@cache
def numbered(count: int) -> Tensor:
    """0 to ``count - 1``, to be read only: thousands of experts share it."""
    return torch.arange(count)


def scatter(positions: Tensor, channels: Tensor, total: int) -> Tensor:
    """``channels`` at ``positions`` of a vector of ``total`` entries, -1 elsewhere."""
    placed = torch.full((total,), -1)
    placed[positions.flatten()] = channels.flatten()
    return placed


def rotary_pairs(size: int, rotary: int, kind: Rotary) -> Tensor:
    """Channel of each of a head's ``size`` dimensions: the two that are rotated together share one, the dimensions
    after the first ``rotary`` have one each."""
    if kind == "none":
        return torch.arange(size)
    rotated = torch.arange(rotary)
    pairs = rotated % (rotary // 2) if kind == "half" else rotated // 2
    return torch.cat([pairs, torch.arange(rotary // 2, rotary // 2 + size - rotary)])


def rotary_size(layer: Layer, partial: bool) -> int:
    """How many of a head's dimensions are rotated.

    Raises:
        ArchitectureError: only a part, in a family whose code rotates them all; or an odd number.
    """
    factor = (getattr(layer.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if not partial and factor != 1.0:
        raise ArchitectureError(
            f"partial_rotary_factor is {factor}, but models of type {layer.config.model_type!r} rotate whole heads"
        )
    rotary = int(layer.heads.size * factor)
    if rotary % 2:
        raise ArchitectureError(f"{rotary} of a head's {layer.heads.size} dimensions are rotated, which is odd")
    return rotary
