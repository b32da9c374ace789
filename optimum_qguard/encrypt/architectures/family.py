"""What a family of architectures says about its decoder layers, and the registry of families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optimum_qguard.encrypt.errors import ArchitectureError
from optimum_qguard.encrypt.layouts import Heads, Layer, heads_of, pattern_of
from optimum_qguard.encrypt.sites import Site, Template
from optimum_qguard.registry import Registry


@dataclass(frozen=True)
class Family:
    """Architectures whose decoder layers have the same tensors with the same meaning.

    Attributes:
        model_types: as in config.json.
        layers: what the layers' tensor names may begin with, before the number: a checkpoint of the bare model has
            another beginning than one with a head.
        sites: where weights may be scaled.
        ignored: tensors of a layer that no site touches and that read nothing which a site scales; ``*`` stands for
            any one component. What is neither here nor in a site is an error.
        heads: reads the attention's numbers from a transformers configuration.
        transposed: whether linears are stored as ``(in, out)``.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    sites: tuple[Template, ...]
    ignored: tuple[str, ...] = ()
    heads: Callable[[Any], Heads] = heads_of
    transposed: bool = False

    def expand(self, layer: Layer) -> Iterator[Site]:
        """The sites of one layer.

        Raises:
            ArchitectureError: the layer has a tensor that this family does not know, or lacks one.
        """
        for name in layer.shapes:
            if not self._knows(name):
                raise ArchitectureError(
                    f"{layer.prefix}{name} is not known in models of type {layer.config.model_type!r}: what it reads "
                    "cannot be told, so scaling other tensors of its layer might change what the model computes"
                )
        for template in self.sites:
            if template.when(layer.config):
                yield from template.expand(layer)

    def _knows(self, tensor: str) -> bool:
        module = tensor.removesuffix(".weight").removesuffix(".bias")
        return any(pattern.fullmatch(module) for pattern in self._modules) or any(
            pattern.fullmatch(tensor) for pattern in self._ignored
        )

    @cached_property
    def _modules(self) -> list[re.Pattern[str]]:
        return [pattern_of(module) for module in sorted({m for site in self.sites for m in site.modules()})]

    @cached_property
    def _ignored(self) -> list[re.Pattern[str]]:
        return [pattern_of(tensor) for tensor in self.ignored]


_REGISTRY: Registry[Family] = Registry("architecture", "optimum_qguard.encrypt.architectures")


def register(family: Family) -> None:
    """Make a family known by its model types. Called at the end of each family's file."""
    for model_type in family.model_types:
        _REGISTRY.add(model_type, family)
