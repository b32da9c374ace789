"""How a report is shown, one file each, found by themselves.

A writer is a file here that calls `register`.
"""

from __future__ import annotations

from optimum_qguard.scan.writer import _REGISTRY, Writer

__all__ = ["get_writer", "writer_names"]


def writer_names() -> list[str]:
    """The names of all writers, sorted."""
    return _REGISTRY.names()


def get_writer(name: str) -> Writer:
    """The writer of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.look_up(name)
