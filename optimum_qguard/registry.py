"""Things that are known by name, one file each in a package of their own, which are found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """What the files of a package have made known.

    Args:
        kind: what one of them is called.
        package: whose files they are; imported when a name is first asked for.
        error: what an unknown name raises.
    """

    def __init__(self, kind: str, package: str, error: type[Exception] = ValueError) -> None:
        super().__init__()
        self._kind = kind
        self._package = package
        self._error = error
        self._complete = False

    def add(self, name: str, value: T) -> None:
        """Make one known.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"{self._kind} {name!r} is registered twice")
        self[name] = value

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self)

    def look_up(self, name: str) -> T:
        """What has this name. Raises the registry's error, which lists the known ones, if nothing has."""
        self._discover()
        if name not in self:
            raise self._error(f"unknown {self._kind} {name!r}; known: {', '.join(sorted(self))}")
        return self[name]

    def _discover(self) -> None:
        if self._complete:
            return
        for entry in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            importlib.import_module(f"{self._package}.{entry.name}")
        self._complete = True
