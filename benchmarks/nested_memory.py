"""What several widths of a model cost at once: one nested copy against torchao's copies, and switching against loading.

All are saved and loaded from safetensors, as a server would. torchao keeps every symbol in a byte whatever its width,
so "packed" says how large copies would be that waste no bit; nobody loads those here.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Row, alternate, argument_parser, peak_memory, print_table, write
from nested_speed import SMOLLM2, held_bytes
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_qguard import BitMap, PrecisionConfig
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.precision import NestedConfig, set_bits
from optimum_qguard.precision.nested import nested_layers

COPIES = (8, 6, 4)
GROUP_SIZE = 96


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "nested_memory.json")
    parser.add_argument("--model", default=None, help=f"folder or Hub id; by default {SMOLLM2}")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, help="weights that share a grid")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not timed")
    disable_progress_bar()
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    write("nested_memory", rows, arguments.output)
    print_table(rows)


def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """A row for the nested copy, one for separate copies of `COPIES`, and one for those packed."""
    source = arguments.model or smollm2_path()
    save(source, folder / "nested", NestedConfig(group_size=arguments.group_size))
    separate = [folder / str(width) for width in COPIES]
    for width, each in zip(COPIES, separate, strict=True):
        save(source, each, PrecisionConfig(BitMap({"*": width}), group_size=arguments.group_size))
    nested, others = load([folder / "nested"]), load(separate)
    layers = nested_layers(nested[0]).values()
    weights = sum(layer.codes.numel() for layer in layers)
    rest = held_bytes(nested[0]) - weights
    packed = sum(weights * width // 8 + rest for width in COPIES)
    widths = itertools.cycle(COPIES)
    timings = alternate(
        {"switch": lambda: set_bits(nested[0], next(widths)), "load": partial(load, separate[:1])}, arguments.repeats
    )
    peaks = {}
    for name, folders in (("nested", [folder / "nested"]), ("separate", separate)):
        peak = peak_memory(partial(load, folders), prepare=partial(load, folders[:1]))
        peaks[name] = (peak.rss if arguments.device == "cpu" else peak.cuda) / 1e6
    copies = f"copies at {', '.join(map(str, COPIES))} bits"
    columns = ("held", "widths", "held MB", "peak of loading MB", "to another width ms")
    return [
        dict(zip(columns, row, strict=True))
        for row in (
            ("one nested copy", 7, held(nested), peaks["nested"], timings.median("switch") * 1e3),
            (f"torchao, {copies}", len(COPIES), held(others), peaks["separate"], None),
            (f"packed, {copies}", len(COPIES), packed / 1e6, None, None),
            ("torchao, one copy, loaded anew", len(COPIES), held(others[:1]), None, timings.median("load") * 1e3),
        )
    ]


def save(source: str | Path, folder: Path, config: Any) -> None:
    """Quantize on load, and save."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)


def load(folders: Sequence[Path]) -> list[Any]:
    """All of them at once."""
    return [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]


def held(models: Sequence[Any]) -> float:
    """Megabytes of parameters and buffers."""
    return sum(map(held_bytes, models)) / 1e6


if __name__ == "__main__":
    main()
