"""What benchmarks/fuzz_headers.py found to reach all code, replayed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fuzz_headers import replay

CORPUS = Path(__file__).with_name("corpus")


def test_corpus() -> None:
    results = Counter(replay(path.read_bytes()) for path in sorted(CORPUS.iterdir()))
    assert min(results["read"], results["refused"]) >= 5
