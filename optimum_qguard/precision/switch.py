"""Change the width that a nested model computes with: for good, for a while, or at random.

A forward, and a call of ``generate``, keep the widths that they began with: what other threads and tasks do meanwhile
changes nothing. `bits` and `random_bits` hold in the thread or task that enters them only; a thread that is started
within does not inherit them unless it runs in a copy of the context (``contextvars.copy_context().run``). `set_bits`
and `set_random_bits` hold everywhere.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import get_args

from torch import nn

from optimum_qguard.precision.bitmap import BitMap, check_bits, matches
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.nested import nested_layers
from optimum_qguard.precision.widths import FixedWidths, Per, Policy, RandomWidths, Switch, Widths

WIDTHS = (4, 6, 8)
# Whoever sets the widths of a part keeps those of the rest, and must not put back what another thread has just changed.
_SETTING = threading.Lock()


def set_bits(model: nn.Module, bits: int | BitMap | Mapping[str, int]) -> None:
    """Let nested layers compute at a width from their next forward or ``generate`` on, in every thread.

    Args:
        model: that `nest` was given, or a part of it, whose layers alone change.
        bits: 2 to 8 for all layers; or a bit map, whose layers that no pattern matches keep their width.

    Raises:
        PrecisionError: no nested layers; a width out of range, or none, in a bit map; a pattern that matches no nested
            layer; or layers that would keep a random width.
    """
    switch, layers = _nested(model)
    widths = _widths(layers, bits)
    with _SETTING:
        switch.everywhere = FixedWidths(_completed(widths, switch, switch.everywhere))


@contextlib.contextmanager
def bits(model: nn.Module, bits: int | BitMap | Mapping[str, int]) -> Iterator[None]:
    """Let nested layers compute at a width for a while, in this thread or task only. Arguments and errors as for
    `set_bits`."""
    switch, layers = _nested(model)
    with switch.using(FixedWidths(_completed(_widths(layers, bits), switch, switch.policy()))):
        yield


def set_random_bits(
    model: nn.Module, widths: Sequence[int] = WIDTHS, *, per: Per = "forward", seed: int | None = None
) -> Sequence[int]:
    """Draw widths as `random_bits` does, in every thread, until `set_bits` ends it. Arguments and errors as there.

    Returns:
        What is drawn, as it is drawn: the last 16,384, oldest first.
    """
    switch, layers = _nested(model)
    with _SETTING:
        policy = _random(layers, switch, switch.everywhere, widths, per, seed)
        switch.everywhere = policy
    return policy.draws


@contextlib.contextmanager
def random_bits(
    model: nn.Module, widths: Sequence[int] = WIDTHS, *, per: Per = "forward", seed: int | None = None
) -> Iterator[Sequence[int]]:
    """Let nested layers compute at widths that are drawn, each with the same probability, in this thread or task only.

    ``generate`` works as ever: with caches, beams, batches and pipelines.

    Args:
        model: as for `set_bits`.
        widths: to draw from; one that stands there twice is drawn twice as often.
        per: ``"forward"``: each forward of the model draws, so each new token does. ``"request"``: each call of
            ``generate`` draws once, and so does a forward outside of one.
        seed: for experiments, which must be repeatable. By default the operating system draws, and nobody can foresee
            the widths.

    Yields:
        What is drawn, as it is drawn: the last 16,384, oldest first.

    Raises:
        PrecisionError: no nested layers; no widths, or one out of range; another ``per``.
    """
    switch, layers = _nested(model)
    policy = _random(layers, switch, switch.policy(), widths, per, seed)
    with switch.using(policy):
        yield policy.draws


def _nested(model: nn.Module) -> tuple[Switch, list[str]]:
    """The model's switch, and the names of the nested layers."""
    layers = list(nested_layers(model).values())
    if not layers:
        raise PrecisionError(f"{type(model).__name__} has no nested layers to switch; call nest(model) first")
    return layers[0].switch, [layer.name for layer in layers]


def _widths(layers: Iterable[str], bits: int | BitMap | Mapping[str, int]) -> Widths:
    if isinstance(bits, int):
        check_bits(bits, "the model")
        return dict.fromkeys(layers, bits)
    bitmap = bits if isinstance(bits, BitMap) else BitMap(bits)
    found: dict[str, int] = {}
    for pattern, width in reversed(bitmap.patterns):
        matched = [name for name in layers if matches(pattern, name)]
        if not matched:
            raise PrecisionError(f"pattern {pattern!r} matches no nested layer of the model")
        if width is None:
            raise PrecisionError(f"pattern {pattern!r} has no width, but nested layers have no full precision to go to")
        found.update(dict.fromkeys(matched, width))
    return found


def _completed(widths: Widths, switch: Switch, policy: Policy) -> Widths:
    """With those of the layers that keep theirs."""
    kept = policy.widths if isinstance(policy, FixedWidths) else {}
    complete = {**kept, **widths}
    missing = [name for name in switch.layers if name not in complete]
    if missing:
        raise PrecisionError(
            f"{missing[0]} has a random width, which it cannot keep: give it one, with '*' for the rest"
        )
    return complete


def _random(
    layers: Iterable[str], switch: Switch, policy: Policy, widths: Sequence[int], per: Per, seed: int | None
) -> RandomWidths:
    if isinstance(widths, int):
        raise PrecisionError(f"widths is {widths}; give several to draw from, such as (4, 6, 8), or use set_bits")
    if not widths:
        raise PrecisionError("no widths to draw from; give some from 2 to 8")
    if per not in get_args(Per):
        raise PrecisionError(f"per is {per!r}; choose {' or '.join(map(repr, get_args(Per)))}")
    for width in widths:
        check_bits(width, "a width to draw")
    choices = tuple((width, _completed(dict.fromkeys(layers, width), switch, policy)) for width in widths)
    return RandomWidths(choices, per) if seed is None else RandomWidths(choices, per, Random(seed))  # noqa: S311
