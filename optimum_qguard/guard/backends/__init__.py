"""The libraries that guard knows, one file each, found by themselves."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any

from optimum_qguard.guard.backends.backend import Backend
from optimum_qguard.guard.errors import QGuardConfigError

__all__ = ["Backend", "backend_of", "backends", "preset", "preset_names"]


def backends() -> list[Backend]:
    """All backends, in the order of their file names."""
    found = []
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found += [instance for instance in vars(module).values() if isinstance(instance, Backend)]
    return found


def backend_of(config: Any) -> Backend:
    """The backend of a transformers quantization configuration, or of one that becomes the ``library_config`` which it
    names while a model is loaded.

    Raises:
        QGuardConfigError: none knows it, or it cannot be guarded.
    """
    config = getattr(config, "library_config", config)
    method = str(getattr(config.quant_method, "value", config.quant_method))
    for backend in backends():
        if method in backend.quant_methods:
            backend.check(config)
            return backend
    known = sorted({method for backend in backends() for method in backend.quant_methods})
    raise QGuardConfigError(
        f"{type(config).__name__} (quant_method {method!r}) cannot be guarded: guard does not know what it does to a "
        f"tensor, or it only loads weights that are quantized already. Guard knows: {', '.join(known)}"
    )


def preset_names() -> list[str]:
    """What ``qguard guard --format`` takes for libraries, sorted."""
    return sorted(name for backend in backends() for name in backend.presets)


def preset(name: str, **arguments: Any) -> Any:
    """The transformers quantization configuration of that name; ``arguments`` are passed on to it.

    Raises:
        QGuardConfigError: unknown name, or the library is not installed (the message says how to install it).
    """
    for backend in backends():
        if name in backend.presets:
            require(backend)
            make: Callable[..., Any] = backend.presets[name]
            return make(**arguments)
    raise QGuardConfigError(f"unknown format {name!r}; known: {', '.join(preset_names())}")


def require(backend: Backend) -> None:
    """Raise `QGuardConfigError` with the pip command if the backend's library is not installed."""
    package, extra = backend.requirement
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        command = "pip install optimum-qguard" if extra is None else f"pip install 'optimum-qguard[{extra}]'"
        raise QGuardConfigError(f"the package {package} is not installed; install it with: {command}")
