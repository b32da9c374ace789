"""Which width the layers of a nested model compute with: for everybody, or in one thread or task only."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

Widths = Mapping[str, int]
Per = Literal["forward", "request"]

KEPT_DRAWS = 1 << 14
"""A model that serves for months draws billions of times."""


@dataclass(frozen=True)
class FixedWidths:
    """The same widths, by layer, in every forward."""

    widths: Widths
    per: Per = "request"

    def draw(self) -> Widths:
        """The widths."""
        return self.widths


@dataclass(frozen=True)
class RandomWidths:
    """Widths that are drawn, each from ``choices`` with the same probability, for each forward or each request.

    Attributes:
        choices: pairs of the number of bits that stands for it, and the widths by layer.
        per: what is drawn for.
        generator: where randomness comes from: the operating system by default.
        draws: what was drawn last, at most `KEPT_DRAWS`, oldest first.
    """

    choices: tuple[tuple[int, Widths], ...]
    per: Per
    generator: Random = field(default_factory=secrets.SystemRandom)
    draws: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_DRAWS))

    def draw(self) -> Widths:
        """Draw once."""
        bits, widths = self.generator.choice(self.choices)
        self.draws.append(bits)
        return widths


Policy = FixedWidths | RandomWidths


@dataclass(frozen=True)
class _State:
    """What holds in a thread or task: where widths come from, and those of the forward or request under way."""

    policy: Policy
    widths: Widths | None = None


_STATES: ContextVar[Mapping[Switch, _State]] = ContextVar("optimum_qguard_widths", default={})  # noqa: B039


class Switch:
    """What the layers of one model ask for their width.

    A forward or a request keeps the widths that it began with, whatever other threads and tasks do.

    Attributes:
        layers: names.
        everywhere: what holds in every thread and task that has no `using` of its own; to be set, too.
    """

    def __init__(self, widths: Widths) -> None:
        self.layers = tuple(widths)
        self.everywhere: Policy = FixedWidths(widths)

    def __deepcopy__(self, memo: dict[int, object]) -> Switch:
        # Policies are shared: they do not change, and the operating system's randomness cannot be copied.
        copy = Switch(dict.fromkeys(self.layers, 0))
        copy.everywhere = self.everywhere
        return copy

    @contextlib.contextmanager
    def using(self, policy: Policy) -> Iterator[None]:
        """For a while, and only in this thread or task."""
        with self._holding(_State(policy)):
            yield

    @contextlib.contextmanager
    def call(self, kind: Per) -> Iterator[None]:
        """A forward of the model, or a request, is under way."""
        state = self._state()
        if state.widths is None and (kind == "forward" or state.policy.per == "request"):
            state = replace(state, widths=state.policy.draw())
        with self._holding(state):
            yield

    def width(self, layer: str) -> int:
        """Bits of a layer. One that is called by itself is a forward of its own."""
        state = self._state()
        return (state.policy.draw() if state.widths is None else state.widths)[layer]

    def policy(self) -> Policy:
        """Where widths come from, here and now."""
        return self._state().policy

    def _state(self) -> _State:
        return _STATES.get().get(self) or _State(self.everywhere)

    @contextlib.contextmanager
    def _holding(self, state: _State) -> Iterator[None]:
        token = _STATES.set({**_STATES.get(), self: state})
        try:
            yield
        finally:
            _STATES.reset(token)
