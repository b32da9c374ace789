"""What a writer is, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimum_qguard.registry import Registry
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.report import ScanReport

Writer = Callable[[Sequence[ScanReport]], str]
"""Reports of one run as text that ends with a line's end."""

_REGISTRY: Registry[Writer] = Registry("format", "optimum_qguard.scan.writers", ScanError)


def register(name: str, writer: Writer) -> None:
    """Make a writer known by name. Called at the end of each writer's file."""
    _REGISTRY.add(name, writer)
