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

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["norm", "value", "up", "key"]


@dataclass(frozen=True)
class Part:
    """One tensor of a site.

    Attributes:
        tensor: its name in the checkpoint.
        channels: int64, of as many dimensions as the tensor and broadcastable to its shape: which of the site's
            channels each entry belongs to, -1 for none.
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
        parts: the tensors that take part, each at most once.
    """

    name: str
    kind: Kind
    n_channels: int
    parts: tuple[Part, ...]
