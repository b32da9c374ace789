from __future__ import annotations

import re
import subprocess
import sys

import pytest

from optimum_qguard.evaluate import standard_library_text
from optimum_qguard.evaluate.text import _MODULES


def test_length_and_content() -> None:
    text = standard_library_text(20_000)
    assert len(text) == 20_000
    assert text.startswith("Python Library Documentation: module difflib")
    assert standard_library_text(30_000).startswith(text)
    words = re.findall(r"[a-z]+", text.lower())
    assert sum(word in {"the", "of", "a", "to", "and", "is", "in", "for"} for word in words) > 0.1 * len(words)


@pytest.mark.parametrize("split", ["evaluation", "training"])
def test_much_text_without_traces_of_this_machine(split: str) -> None:
    text = standard_library_text(400_000, split)
    assert not re.search(r"0x[0-9a-f]{6}", text)
    for path in {sys.prefix, sys.base_prefix}:
        assert path not in text


def test_splits_are_disjoint() -> None:
    assert not set(_MODULES["evaluation"]) & set(_MODULES["training"])


def test_the_same_in_every_process() -> None:
    script = (
        "from hashlib import sha256; from optimum_qguard.evaluate import standard_library_text as text;"
        "print(*(sha256(text(400_000, split).encode()).hexdigest() for split in ('evaluation', 'training')))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_more_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"the evaluation text has \d+ characters, fewer than the 9999999"):
        standard_library_text(9_999_999)
