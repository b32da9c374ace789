"""Where a transformer computes the same with other weights: a channel multiplied in one tensor, divided in others.

A *site* is a set of channels between producers and consumers: ``y = W x`` stays what it is if a column of ``W`` is
multiplied by a power of two and what computes that entry of ``x`` is divided by it. Four kinds are used:

=========  ================================  ==================================================================
kind       divided                           multiplied
=========  ================================  ==================================================================
norm       a norm's weight and bias          the columns of every linear that reads the norm
value      rows of the value projection      the columns of the output projection, for every head of the group
up         rows of the up projection         the columns of the down projection
key        rows of the key projection        rows of the query projection, for every head of the group
=========  ================================  ==================================================================

Powers of two change a floating-point number's exponent only, so every product and every sum stays bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from optimum_qguard.encrypt.errors import ArchitectureError, EncryptError
from optimum_qguard.encrypt.layouts import (
    Channels,
    Layer,
    Projections,
    Rotary,
    numbered,
    pattern_of,
    rotary_pairs,
    rotary_size,
    scatter,
)

Kind = Literal["norm", "value", "up", "key"]


@dataclass(frozen=True)
class Part:
    """One tensor of a site.

    Attributes:
        tensor: its name in the checkpoint.
        channels: int64, of as many dimensions as the tensor and broadcastable to its shape: which of the site's
            channels each entry belongs to, -1 for none. To be read only: parts share it.
        divided: whether it is divided by the channel's factor; multiplied otherwise.
    """

    tensor: str
    channels: Tensor
    divided: bool


@dataclass(frozen=True)
class Site:
    """One invariance.

    Attributes:
        name: unique in the model and stable for ever, since factors are drawn from it.
        kind: which of the four it is.
        n_channels: how many factors may be chosen freely.
        parts: the tensors that take part. One that holds queries and keys takes part twice, on entries of its own
            each time.
        block: how many channels in a row, a head's dimensions, may be mixed by any invertible matrix (its inverse in
            the divided tensors) without changing what the model computes; 1 where channels may only be scaled.
    """

    name: str
    kind: Kind
    n_channels: int
    parts: tuple[Part, ...]
    block: int = 1


def always(_config: Any) -> bool:
    return True


class Template(Protocol):
    """What a kind of site is in a family's layers.

    ``when`` says, given a transformers configuration, whether the invariance holds; the tensors are known either way.
    """

    @property
    def when(self) -> Callable[[Any], bool]: ...

    def modules(self) -> tuple[str, ...]:
        """Every module that it speaks of, ``*`` standing for any one component of the name."""

    def expand(self, layer: Layer) -> Iterator[Site]:
        """The sites in that layer."""


def in_band(sites: Iterable[Site], first: int, last: int | None) -> dict[int, Site]:
    """The value sites of a band of layers, by the layer's number among those that have one.

    Args:
        sites: of the whole model, in the order of its layers.
        first, last: of the band, both in it; without ``last``, up to the end.

    Raises:
        EncryptError: there is no such layer.
    """
    layers = [site for site in sites if site.kind == "value"]
    band = {layer: site for layer, site in enumerate(layers) if first <= layer and (last is None or layer <= last)}
    if not band or first < 0 or (last is not None and last >= len(layers)):
        until = "" if last is None else f" to {last}"
        raise EncryptError(f"layers {first}{until}: the model has layers 0 to {len(layers) - 1}")
    return band


def make_site(
    layer: Layer,
    kind: Kind,
    module: str,
    divided: Iterable[Channels],
    multiplied: Iterable[Channels],
    *,
    block: int = 1,
) -> Site:
    """A site named by its layer and by the module whose output is divided."""
    parts = [Part(*tensor, True) for tensors in divided for tensor in tensors]
    parts += [Part(*tensor, False) for tensors in multiplied for tensor in tensors]
    n_channels = 1 + max(int(part.channels.max()) for part in parts)
    return Site(f"{layer.prefix}{kind}.{module}", kind, n_channels, tuple(parts), block)


@dataclass(frozen=True)
class Norm:
    """A norm that nothing but ``readers`` reads; those that a layer lacks (experts in dense layers) are passed over."""

    norm: str
    readers: tuple[str, ...]
    when: Callable[[Any], bool] = always

    def modules(self) -> tuple[str, ...]:
        return self.norm, *self.readers

    def expand(self, layer: Layer) -> Iterator[Site]:
        channels = torch.arange(layer.shapes[layer.weight(self.norm)][0])
        readers = [module for reader in self.readers for module in layer.modules(reader)]
        if not readers:
            raise ArchitectureError(f"{layer.prefix}{self.norm} has no reader in the checkpoint")
        multiplied = [layer.columns(module, channels) for module in readers]
        yield make_site(layer, "norm", self.norm, [layer.vector(self.norm, channels)], multiplied)


@dataclass(frozen=True)
class ValueOutput:
    """Values are averaged by the attention, then read by the output projection ``output``."""

    projections: Projections
    output: str
    when: Callable[[Any], bool] = always

    def modules(self) -> tuple[str, ...]:
        return *self.projections.modules(), self.output

    def expand(self, layer: Layer) -> Iterator[Site]:
        heads = layer.heads
        channels = torch.arange(heads.groups * heads.size).view(heads.groups, heads.size)
        module, rows, total = self.projections.rows("value", heads)
        divided = layer.rows(module, scatter(rows, channels, total))
        multiplied = layer.columns(self.output, heads.per_query(channels).flatten())
        yield make_site(layer, "value", module, [divided], [multiplied], block=heads.size)


@dataclass(frozen=True)
class UpDown:
    """What the gate multiplies enters the down projection linearly.

    Attributes:
        up, down: linears; with ``*`` in their names, one site for each expert that there is. Three-dimensional tensors
            ``(experts, out, in)`` are all experts in one site. A layer that has neither has no site.
        stacked: ``up`` holds the gate's rows, then as many of its own.
    """

    up: str
    down: str
    stacked: bool = False
    when: Callable[[Any], bool] = always

    def modules(self) -> tuple[str, ...]:
        return self.up, self.down

    def expand(self, layer: Layer) -> Iterator[Site]:
        found = layer.modules(self.up)
        if not found and layer.modules(self.down):
            raise ArchitectureError(f"{layer.prefix}{self.up}.weight is missing from the checkpoint")
        for up in found:
            expert = pattern_of(self.up).fullmatch(up)
            down = self.down.replace("*", expert[1]) if expert and "*" in self.up else self.down
            shape = layer.shapes[layer.weight(down)]
            experts = shape[0] if len(shape) == 3 else 1
            width = shape[-2 if layer.transposed else -1]
            channels = numbered(experts * width)
            rows = columns = channels.view(experts, width) if len(shape) == 3 else channels
            if self.stacked:
                rows = torch.cat([torch.full_like(rows, -1), rows], dim=-1)
            yield make_site(layer, "up", up, [layer.rows(up, rows)], [layer.columns(down, columns)])


@dataclass(frozen=True)
class QueryKey:
    """Queries and keys only meet in their inner product, after rotary embedding.

    Attributes:
        rotary: which dimensions are rotated together: ``d`` and ``d + rotary / 2``, or ``2 d`` and ``2 d + 1``.
        partial: whether the family's code honours ``partial_rotary_factor``.
        query_norm, key_norm: norms of queries and keys. Where the checkpoint has them they take the factors instead of
            the rows: a weight for all heads, for each dimension of each, or one module per head (``*``).
    """

    projections: Projections
    rotary: Rotary = "half"
    partial: bool = False
    query_norm: str | None = None
    key_norm: str | None = None
    when: Callable[[Any], bool] = always

    def modules(self) -> tuple[str, ...]:
        return *self.projections.modules(), *filter(None, (self.query_norm, self.key_norm))

    def expand(self, layer: Layer) -> Iterator[Site]:
        heads = layer.heads
        rotary = 0 if self.rotary == "none" else rotary_size(layer, self.partial)
        pairs = rotary_pairs(heads.size, rotary, self.rotary)
        free = int(pairs.max()) + 1
        keys = pairs + free * torch.arange(heads.groups)[:, None]
        queries = heads.per_query(keys)
        query, key = self.query_norm, self.key_norm
        if query is None or key is None or not layer.modules(query):
            query, query_rows, total = self.projections.rows("query", heads)
            multiplied = [layer.rows(query, scatter(query_rows, queries, total))]
            key, key_rows, total = self.projections.rows("key", heads)
            divided = [layer.rows(key, scatter(key_rows, keys, total))]
        elif "*" in query:
            divided = [layer.vector(key.replace("*", str(n)), keys[n]) for n in range(heads.groups)]
            multiplied = [layer.vector(query.replace("*", str(n)), queries[n]) for n in range(heads.queries)]
        elif math.prod(layer.shapes[layer.weight(query)]) == heads.size:
            divided, multiplied = [layer.vector(key, pairs)], [layer.vector(query, pairs)]
        else:
            divided, multiplied = [layer.vector(key, keys)], [layer.vector(query, queries)]
        yield make_site(layer, "key", key.removesuffix(".*"), divided, multiplied)
