"""Tensors that transformers makes while loading, out of those that a checkpoint has.

The experts of a layer are many matrices in most checkpoints, and one or two tensors in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimum_qguard.checkpoint import CheckpointReader


@dataclass(frozen=True)
class Stored:
    """Where a weight's values are in a checkpoint.

    Attributes:
        names: of the tensors there.
        target: the weight's name in the model.
        converter: of transformers, what makes one of them; ``None`` where the one tensor is the weight.
        patterns: for the converter, what each of the names matched.
    """

    names: tuple[str, ...]
    target: str = ""
    converter: Any = None
    patterns: tuple[str, ...] = ()

    def tensor(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight, of what ``read`` gives for each name.

        Raises:
            RuntimeError: their shapes do not go together.
        """
        if self.converter is None:
            return read(self.names[0])
        converter = deepcopy(self.converter)
        for name, pattern in zip(self.names, self.patterns, strict=True):
            converter.add_tensor(self.target, name, pattern, read(name))
        made: Tensor | list[Tensor] = converter.convert(self.target)[self.target]
        return made[0] if isinstance(made, list) else made


def merged_tensors(model: Any, reader: CheckpointReader, wanted: Collection[str]) -> dict[str, Stored]:
    """Those of the wanted weights of a model that transformers would make of a checkpoint's tensors, or rename."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = dict.fromkeys(wanted, True)
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(reader.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target in state:
            parts.setdefault(target, []).append((name, pattern))
    found = {}
    for target, matched in parts.items():
        names, patterns = zip(*matched, strict=True)
        found[target] = (
            Stored(names) if patterns[0] is None else Stored(names, target, by_pattern[patterns[0]], patterns)
        )
    return found
