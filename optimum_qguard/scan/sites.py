"""Where a transformer may be scaled without a change: what computes a channel, and what reads it, by tensor names.

No architecture is known here, only what the parts of decoder and encoder layers are called. Where a name leaves open
what reads what, all possibilities are sites: two tensors that have nothing to do with each other are not out of balance
in the same channels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from optimum_qguard.scan.channels import Channels, Octaves, median, merge_columns, merge_rows

_LAYER = re.compile(r"(?:.*:)?(.*?\.\d+\.)(.+)\.weight")
_NORM = re.compile(r"norm|(^|[._])ln(_|$|\d)", re.IGNORECASE)
_READERS = {
    "attention": (
        "q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value", "qkv_proj", "query_key_value", "c_attn",
        "Wqkv", "W_pack", "qkv", "in_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_lin", "k_lin", "v_lin",
    ),
    "feed-forward": (
        "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "dense_h_to_4h", "wi", "wi_0", "wi_1",
        "intermediate.dense", "lin1",
    ),
}  # fmt: skip
_FEED_FORWARD = {
    "down_proj": ("up_proj", "gate_up_proj"),
    "w2": ("w3", "w1"),
    "fc2": ("fc1",),
    "c_proj": ("c_fc",),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "wo": ("wi_1", "wi"),
    "lin2": ("lin1",),
}
_ATTENTION = {
    "o_proj": ("v_proj", "qkv_proj", "W_pack"),
    "out_proj": ("v_proj", "Wqkv"),
    "o": ("v",),
    "c_proj": ("c_attn",),
    "out_lin": ("v_lin",),
    "dense": ("v_proj", "query_key_value"),
}
_KEYS = {"q_proj": "k_proj", "q": "k", "query": "key", "q_lin": "k_lin"}
_FUSED = ("qkv_proj", "W_pack", "Wqkv", "c_attn")  # rows of queries, of keys, of values
_INTERLEAVED = "query_key_value"


@dataclass(frozen=True)
class SiteSizes:
    """Sizes around one site's channels, in octaves.

    Attributes:
        kind: ``"norm"``, ``"value"``, ``"up"`` or ``"key"``.
        producer, reader: a tensor that computes the channels, and one that reads them.
        computed, read: ``(channels,)``, how large each channel's weights are in both; a mean, where many read.
    """

    kind: str
    producer: str
    reader: str
    computed: Octaves
    read: Octaves


def find_sites(evidence: Mapping[str, Sequence[Channels]], config: Mapping[str, Any]) -> Iterator[SiteSizes]:
    """The sites of a checkpoint.

    Args:
        evidence: what `measure` found, by tensor.
        config: the model's ``config.json``, for the length of a head, and to know norms that multiply by one plus
            their weight.
    """
    plus_one = str(config.get("model_type", "")).startswith("gemma")
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for tensor in evidence:
        match = _LAYER.fullmatch(tensor)
        if match is not None:
            layers[match[1]][match[2]] = tensor
    for modules in layers.values():
        if not plus_one:
            yield from _norm_sites(modules, evidence)
        for module, tensor in modules.items():
            yield from _pairs(module, tensor, modules, evidence, _head_length(config))


def _norm_sites(modules: Mapping[str, str], evidence: Mapping[str, Sequence[Channels]]) -> Iterator[SiteSizes]:
    norms = {
        module: tensor for module, tensor in modules.items() if _NORM.search(module) and _is_vector(evidence[tensor])
    }
    for names in _READERS.values():
        readers = [
            tensor for module, tensor in modules.items() if _ends(module, names) and not _is_vector(evidence[tensor])
        ]
        by_length: dict[int, list[str]] = defaultdict(list)
        for reader in readers:
            by_length[evidence[reader][0].shape[-1]].append(reader)
        read = {
            length: np.stack([_centered(merge_columns(evidence[reader])) for reader in same]).mean(0)
            for length, same in by_length.items()
        }
        for norm in norms.values():
            weight = merge_columns(evidence[norm])
            if len(weight) in read:
                yield SiteSizes("norm", norm, by_length[len(weight)][0], weight, read[len(weight)])


def _pairs(
    module: str, tensor: str, modules: Mapping[str, str], evidence: Mapping[str, Sequence[Channels]], head: int | None
) -> Iterator[SiteSizes]:
    parent, _, name = module.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if len(evidence[tensor][0].shape) != 2:
        return
    for kind, table in (("up", _FEED_FORWARD), ("value", _ATTENTION)):
        producer = next((modules[prefix + each] for each in table.get(name, ()) if prefix + each in modules), None)
        if producer is None or len(evidence[producer][0].shape) != 2:
            continue
        read, rows = merge_columns(evidence[tensor]), merge_rows(evidence[producer])
        stem = producer.rsplit(".", 2)[-2]
        if stem == "gate_up_proj":
            rows = rows[len(rows) // 2 :]
        elif stem in _FUSED:
            rows = rows[len(rows) - (len(rows) - len(read)) // 2 :]
        elif stem == _INTERLEAVED:
            rows = _values_of(rows, len(read), head)
        channels = _channels_of(len(read), len(rows), head)
        if channels is not None:
            yield SiteSizes(kind, producer, tensor, rows[channels], read)
    if name in _KEYS and prefix + _KEYS[name] in modules:
        key = modules[prefix + _KEYS[name]]
        queries, keys = merge_rows(evidence[tensor]), merge_rows(evidence[key])
        channels = _channels_of(len(queries), len(keys), head)
        if channels is not None:
            yield SiteSizes("key", key, tensor, keys[channels], queries)


def _values_of(rows: Octaves, readers: int, head: int | None) -> Octaves:
    """The values' rows where each key-value head has its queries, its keys and its values one after another."""
    groups = (len(rows) - readers) // (2 * head) if head else 0
    if not head or groups < 1 or len(rows) % (groups * head):
        return rows[:0]
    return rows.reshape(groups, -1, head)[:, -1].flatten()


def _channels_of(readers: int, producers: int, head: int | None) -> Any:
    """Which row of the key-value heads each of the query heads' channels belongs to; ``None`` if that is not known."""
    if readers == producers:
        return np.arange(readers)
    if not head or not producers or readers % head or producers % head or readers % producers:
        return None
    per_group = readers // producers
    channel = np.arange(readers)
    return channel // head // per_group * head + channel % head


def _head_length(config: Mapping[str, Any]) -> int | None:
    try:
        heads = config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"]
        return int(config.get("head_dim") or config["hidden_size"] // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return f".{module}".endswith(_endings(names))


@cache
def _endings(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


def _is_vector(pieces: Sequence[Channels]) -> bool:
    return len(pieces[0].shape) == 1


def _centered(octaves: Octaves) -> Octaves:
    centered: Octaves = octaves - np.float32(median(octaves))
    return centered
