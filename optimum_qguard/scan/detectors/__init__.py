"""The detectors, one file each, found by themselves.

A detector is a file here that defines a `Detector` under ``@register``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from optimum_qguard.scan.detector import _REGISTRY, Detector
from optimum_qguard.scan.errors import ScanError

__all__ = ["detector_names", "get_detector"]


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def detector_names() -> list[str]:
    """The names of all detectors, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_detector(name: str) -> Detector:
    """The detector of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
    """
    _discover()
    if name not in _REGISTRY:
        raise ScanError(f"unknown detector {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]()
