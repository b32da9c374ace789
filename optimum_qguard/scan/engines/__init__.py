"""Where the work of a scan is done, one file each, found by themselves: in this process, or on a Ray cluster.

An engine is a file here that calls `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from optimum_qguard.scan.engine import _REGISTRY, Engine
from optimum_qguard.scan.errors import ScanError

__all__ = ["engine_names", "get_engine"]


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def engine_names() -> list[str]:
    """The names of all engines, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
        ImportError: what it needs is not installed.
    """
    _discover()
    if name not in _REGISTRY:
        raise ScanError(f"unknown engine {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]
