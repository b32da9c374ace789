"""A clean and a damaged model for each test module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from repair_models import save_clean, save_damaged


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in BF16 with a tokenizer of words; only to be read."""
    return save_clean("llama", tmp_path_factory.mktemp("repair") / "clean")


@pytest.fixture(scope="session")
def damaged(clean: Path) -> Path:
    """The same with noise on its weights; only to be read."""
    return save_damaged(clean, clean.parent / "damaged")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the processes that tests start have, so that sums are the same bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
