"""The detectors, one file each, found by themselves.

A detector is a file here that defines a `Detector` under ``@register``.
"""

from __future__ import annotations

from optimum_qguard.scan.detector import _REGISTRY, Detector

__all__ = ["detector_names", "get_detector"]


def detector_names() -> list[str]:
    """The names of all detectors, sorted."""
    return _REGISTRY.names()


def get_detector(name: str) -> Detector:
    """The detector of that name.

    Raises:
        ScanError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.look_up(name)()
