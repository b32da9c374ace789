"""What a writer is, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimum_qguard.scan.report import ScanReport

Writer = Callable[[Sequence[ScanReport]], str]
"""Reports of one run as text that ends with a line's end."""

_REGISTRY: dict[str, Writer] = {}


def register(name: str, writer: Writer) -> None:
    """Make a writer known by name. Called at the end of each writer's file."""
    if name in _REGISTRY:
        raise ValueError(f"writer {name!r} is registered twice")
    _REGISTRY[name] = writer
