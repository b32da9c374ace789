"""The index of a checkpoint in several files: ``model.safetensors.index.json``, which says what tensor is in which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.json_object import parse_object

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Index:
    """What an index says.

    Attributes:
        weight_map: name of the file, in the index's own folder, by tensor.
        total_size: of all tensors, in bytes; ``None`` if it does not say.
    """

    weight_map: dict[str, str]
    total_size: int | None

    @property
    def shards(self) -> list[str]:
        """The files, sorted."""
        return sorted(set(self.weight_map.values()))


def parse_index(content: bytes, file: str) -> Index:
    """Check an index.

    Args:
        file: what errors call it.

    Raises:
        CheckpointError: it is no JSON, has no map from tensors to files, or names a file outside its folder.
    """
    try:
        found = parse_object(content)
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from error
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{file}: has no weight_map from tensor names to file names; download it again")
    for shard in set(weight_map.values()):
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{file}: names {shard!r:.200}, which is not a .safetensors file in this folder; "
                "do not use this checkpoint"
            )
    return Index(weight_map, _total_size(found.get("metadata")))


def _total_size(metadata: Any) -> int | None:
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(size, float) and size.is_integer():  # some tools write it so
        return int(size)
    return size if type(size) is int else None
