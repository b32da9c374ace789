"""The benchmark of nested widths' memory runs on a tiny model, and its rows say what they claim."""

from argparse import Namespace
from pathlib import Path

from nested_memory import measure
from tiny_models import save_tiny


def test_rows(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    arguments = Namespace(model=folder, group_size=32, repeats=2, device="cpu")
    nested, separate, packed, reloaded = measure(arguments, tmp_path)
    assert separate["held MB"] > packed["held MB"] > nested["held MB"]  # type: ignore[operator]
    assert separate["held MB"] > 2.5 * reloaded["held MB"]  # type: ignore[operator]
    assert reloaded["to another width ms"] > nested["to another width ms"]  # type: ignore[operator]
