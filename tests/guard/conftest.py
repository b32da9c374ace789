from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a float32 model of `tiny_models.CONFIGS`, by name; only to be read."""
    from tiny_models import save_tiny  # pytest puts this folder on the path after it has read this file

    @cache
    def save(name: str) -> Path:
        return save_tiny(name, tmp_path_factory.mktemp(name) / "model")

    return save
