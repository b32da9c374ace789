"""Register with transformers at the moment it can be done for nothing.

transformers has no entry points for quantizers: a plugin calls its registration functions, which live in a module that
imports torch and every installed quantization library. Importing that here would make ``import optimum_qguard`` several
times as slow as ``import transformers``; so the registration waits until somebody imports that module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def _register() -> None:
    # They register when imported. If that import is what has imported the target, it goes on and registers then.
    importlib.import_module("optimum_qguard.guard.quantizer")
    importlib.import_module("optimum_qguard.precision.nested_config")


class _RegisterAfter(Loader):
    """Loads the target with its own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def install() -> None:
    """Register now if transformers' quantizers are imported already, otherwise as soon as they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
