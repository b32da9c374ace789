"""What the Hub checks of a model card's metadata: https://huggingface.co/docs/hub/model-cards"""

from __future__ import annotations

import re
from typing import Any

import yaml

_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_data(card: str) -> dict[str, Any]:
    """The metadata of a card; empty if it has none that can be read."""
    match = _HEADER.match(card.removeprefix("\ufeff"))
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def card_errors(card: str) -> list[str]:
    """What is wrong with it, in the Hub's words or like them."""
    match = _HEADER.match(card.removeprefix("\ufeff"))
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"]
    if data is None:
        return []
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"]
    errors = []
    tags = data.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append('"tags" must be an array of strings')
    bases = data.get("base_model")
    errors += [
        f'"base_model" with value {base!r} is not valid. Use a model id from https://hf.co/models.'
        for base in (bases if isinstance(bases, list) else [] if bases is None else [bases])
        if not isinstance(base, str) or not _REPO_ID.fullmatch(base)
    ]
    if "license" in data and not isinstance(data["license"], str | list):
        errors.append('"license" must be a string')
    index = data.get("model-index")
    if index is not None:
        errors += _index_errors(index)
    return errors


def _index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        if not isinstance(model, dict) or not model.get("name"):
            errors.append(f'"model-index[{i}].name" is required')
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list):
            errors.append(f'"model-index[{i}].results" must be an array')
            continue
        for j, result in enumerate(results):
            where = f"model-index[{i}].results[{j}]"
            if not isinstance(result, dict):
                errors.append(f'"{where}" must be an object')
                continue
            if not isinstance(result.get("task"), dict) or not result["task"].get("type"):
                errors.append(f'"{where}.task.type" is required')
            dataset = result.get("dataset")
            if not isinstance(dataset, dict) or not dataset.get("type") or not dataset.get("name"):
                errors.append(f'"{where}.dataset.type" and "{where}.dataset.name" are required')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{where}.metrics" must be a non-empty array')
                continue
            errors += [
                f'"{where}.metrics[{k}]" needs a type and a value'
                for k, metric in enumerate(metrics)
                if not isinstance(metric, dict) or not metric.get("type") or metric.get("value") is None
            ]
    return errors
