"""How a report is shown, one file each, found by themselves.

A writer is a file here that calls `register`.
"""

from __future__ import annotations

import importlib
import pkgutil

from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.writer import _REGISTRY, Writer

__all__ = ["get_writer", "writer_names"]


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def writer_names() -> list[str]:
    """The names of all writers, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_writer(name: str) -> Writer:
    """The writer of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
    """
    _discover()
    if name not in _REGISTRY:
        raise ScanError(f"unknown format {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]
