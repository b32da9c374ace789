"""Where the work of a scan is done, one file each, found by themselves: in this process, or on a Ray cluster.

An engine is a file here that calls `register`.
"""

from __future__ import annotations

from optimum_qguard.scan.engine import _REGISTRY, Engine

__all__ = ["engine_names", "get_engine"]


def engine_names() -> list[str]:
    """The names of all engines, sorted."""
    return _REGISTRY.names()


def get_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
        ImportError: what it needs is not installed.
    """
    return _REGISTRY.look_up(name)
