"""Where each architecture's decoder layers can be scaled without changing what they compute.

A family of architectures is one file here, which says in data where its sites are and calls `register`; every file in
this folder is found by itself. Sites are named by checkpoint tensors, as stored on the Hub or by ``save_pretrained``.
Embeddings, the last norm and the head are never touched.

    >>> "llama" in known_model_types()
    True
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from optimum_qguard.encrypt.architectures.family import _REGISTRY, Family, register
from optimum_qguard.encrypt.errors import ArchitectureError
from optimum_qguard.encrypt.layouts import Layer
from optimum_qguard.encrypt.sites import Site

__all__ = ["ArchitectureError", "Family", "find_sites", "known_model_types", "register"]


def known_model_types() -> list[str]:
    """The ``model_type`` of every known architecture, sorted."""
    return _REGISTRY.names()


def find_sites(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Site]:
    """All sites of a checkpoint, in the order of its layers.

    Layers beyond ``num_hidden_layers`` (multi-token prediction) are left alone, as transformers does.

    Args:
        config: config.json; what it leaves out has the default of the transformers configuration of its type.
        shapes: of every tensor, by its name in the checkpoint.

    Raises:
        ArchitectureError: the architecture is unknown, or the layers have other tensors or shapes than it says. It is
            not guessed: an unknown tensor may read what a site scales.
    """
    model_type = config.get("model_type")
    known = ", ".join(_REGISTRY.names())
    family = _REGISTRY.get(str(model_type))
    if family is None:
        raise ArchitectureError(f"it is not known where a model of type {model_type!r} may be scaled; known: {known}")
    text_config = _standardize(config, str(model_type))
    prefix, layers = _layers(family, shapes)
    sites: list[Site] = []
    for index in range(text_config.num_hidden_layers):
        if index not in layers:
            raise ArchitectureError(f"layer {index} of {text_config.num_hidden_layers} is not in the checkpoint")
        layer = Layer(f"{prefix}{index}.", text_config, family.heads(text_config), layers[index], family.transposed)
        sites += family.expand(layer)
    return sites


def _standardize(config: Mapping[str, Any], model_type: str) -> Any:
    """The transformers configuration of the text model: it knows defaults and older spellings of every option."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(config))).get_text_config()
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArchitectureError(f"config.json is not that of a {model_type!r} model: {error}") from error


def _layers(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[int, dict[str, tuple[int, ...]]]]:
    """What the layers' names begin with, and each layer's tensors by the rest of their names."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    pattern = re.compile(f"({'|'.join(map(re.escape, family.layers))})([0-9]+)\\.(.+)")
    for name, shape in shapes.items():
        if match := pattern.fullmatch(name):
            found[match[1]][int(match[2])][match[3]] = tuple(shape)
    if len(found) != 1:
        wanted = " or ".join(f"{prefix}0" for prefix in family.layers)
        what = "no decoder layers" if not found else f"decoder layers under {' and '.join(sorted(found))} at once"
        raise ArchitectureError(f"the checkpoint has {what}; a {family.model_types[0]!r} model has them under {wanted}")
    return next(iter(found.items()))
