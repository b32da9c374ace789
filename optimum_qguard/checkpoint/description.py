"""What a model card says, in its metadata, of what was done to a checkpoint: a summary of its ``qguard.json``, or, if
it was repaired, of its ``repair.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import looks_like_hub_id
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, PROTECTED

BLOCK_KEY = "qguard"
GUARDED = "guard"
ENCRYPTED = "encrypt"
REPAIRED = "repair"
REPAIR_FILE = "repair.json"
RECORDS = (MANIFEST_FILE, REPAIR_FILE)
"""Files that say what was done to the weights beside them."""

_LIBRARY = "transformers"
_PARAMETERS = {
    GUARDED: ("method", "noise", "multiplier", "quantization_config"),
    ENCRYPTED: ("mode", "traps", "conditioning", "residue"),
    REPAIRED: ("recipe",),
}
_RELATIONS = {GUARDED: "quantized", REPAIRED: "finetune"}


def description_file(folder: Path) -> Path:
    """What says what was done: ``qguard.json``, or where there is none ``repair.json``."""
    repair = folder / REPAIR_FILE
    return repair if repair.exists() and not (folder / MANIFEST_FILE).exists() else folder / MANIFEST_FILE


def read_description(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``qguard.json``, of whatever kind; or of its ``repair.json``, as of the kind
    ``"repair"``.

    Raises:
        CheckpointError: there is neither, or it cannot be read.
    """
    path = description_file(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST_FILE} or {REPAIR_FILE}, so no verb of qguard wrote it; to upload it as it is: "
            "hf upload"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); write the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; write the checkpoint again")
    return {**content, "kind": REPAIRED} if path.name == REPAIR_FILE else content


def described_block(description: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under ``qguard`` in a card's metadata.

    ``schema_version``, ``method`` (of the verb), ``package_version``, ``parameters``, ``verification`` (how many
    tensors, and how many of them were checked to come back bit for bit; of a repaired checkpoint the steps and its
    distance from the anchor), the ``key_fingerprint`` of an encrypted checkpoint, the ``anchor`` of a repaired one and
    the ``source``, where those are on the Hub.
    """
    method = _method(description)
    block: dict[str, Any] = {"schema_version": description.get("schema_version"), "method": method}
    block["package_version"] = description.get("package_version")
    names = _PARAMETERS.get(method, ())
    block["parameters"] = {name: description[name] for name in names if description.get(name) is not None}
    tensors = description.get("tensors", ())
    if method == ENCRYPTED:
        mixed = description.get("mixed", {})
        inexact = [name for name, entry in mixed.items() if entry.get("relative_error", 0) > 0]
        block["key_fingerprint"] = description.get("key_fingerprint")
        block["verification"] = {
            "tensors": len(tensors),
            "rewritten_exactly": description.get("verified"),
            "restored_bit_exactly": len(tensors) - len(inexact),
        }
    elif method == GUARDED:
        weights = sum(tensor["weights"] for tensor in tensors)
        changed = sum(tensor["share_changed"] * tensor["weights"] for tensor in tensors) / max(weights, 1)
        block["verification"] = {"tensors": len(tensors), "weights": weights, "share_changed": round(changed, 4)}
    elif method == REPAIRED:
        names = ("steps_done", "anchor_distance_before", "anchor_distance_after")
        block["verification"] = {name: description[name] for name in names if description[name] is not None}
        if description["anchor_revision"]:
            block["anchor"] = {"model": description["anchor"], "revision": description["anchor_revision"]}
    if base := hub_source(description):
        block["source"] = {"model": base} | ({"revision": description["revision"]} if description["revision"] else {})
    return block


def described_metadata(description: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that a card should have, if it does not say otherwise: library, and base model where it is known."""
    metadata: dict[str, Any] = {"library_name": _LIBRARY}
    if base := hub_source(description):
        metadata["base_model"] = base
        if relation := _RELATIONS.get(_method(description)):
            metadata["base_model_relation"] = relation
    return metadata


def hub_source(description: Mapping[str, Any]) -> str | None:
    """The Hub repository that it was made of; ``None`` if that was a folder, whose path is nobody's business."""
    model, revision = description.get("model"), description.get("revision")
    return model if revision and isinstance(model, str) and looks_like_hub_id(model) else None


def _method(description: Mapping[str, Any]) -> str:
    kind = description.get("kind")
    return ENCRYPTED if kind == PROTECTED else GUARDED if kind is None else str(kind)
