"""How long a scan takes: a quick one against SHA-256 over the same files, a full one against a quantizer.

Both sides run in one process in turn. A full scan is told per quantization format, against bitsandbytes quantizing the
same tensors to int8. Memory is the peak above what the imports take. Starting up is told apart: most of it is torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bitsandbytes import functional
from harness import RESULTS, alternate, argument_parser, peak_memory, print_table, write
from random_llama import ONE_BILLION, TINY, random_llama

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.scan.cells import CELLS
from optimum_qguard.scan.scanner import scan

MODELS: dict[str, Callable[[], Path]] = {
    "SmolLM2-135M": smollm2_path,
    "Llama-1B": lambda: random_llama(cache_folder() / "random-llama-1b", ONE_BILLION),
}


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__ or "", RESULTS / "scan_speed.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--full", nargs="*", choices=list(MODELS), default=list(MODELS), help="models to scan in full too, some minutes"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(measure_quick(name, MODELS[name](), arguments.repeats))
        if name in arguments.full:
            rows += measure_full(name, MODELS[name](), arguments.repeats)
    rows += start_up()
    print_table(rows)
    write("scan_speed", rows, arguments.output)


def measure_quick(name: str, folder: Path, repeats: int) -> dict[str, object]:
    """Against reading the files and hashing them."""
    times = alternate({"scan": partial(scan, folder), "reference": partial(sha256, folder)}, repeats)
    seconds = times.median("scan"), times.median("reference")
    return row(name, "quick", "SHA-256", *seconds, times.ratio("scan", "reference")) | {
        "peak MB": peak(partial(scan, folder))
    }


def measure_full(name: str, folder: Path, repeats: int) -> list[dict[str, object]]:
    """Against quantizing the same tensors."""
    spikes = ["residual_spikes"]
    full = alternate(
        {"scan": partial(scan, folder, full=True, detectors=spikes), "reference": partial(quantize, folder)},
        max(1, repeats // 2),
    )
    everything = time_of(partial(scan, folder, full=True))
    formats = len(CELLS)
    return [
        row(
            name,
            f"full, a format of {formats}",
            "bitsandbytes int8",
            full.median("scan") / formats,
            full.median("reference"),
            full.ratio("scan", "reference") / formats,
        )
        | {"peak MB": peak(partial(scan, folder, full=True))},
        row(name, "full, all detectors", "bitsandbytes int8", everything, full.median("reference"), None),
    ]


def row(
    model: str, scanned: str, reference: str, seconds: float, other: float, ratio: float | None
) -> dict[str, object]:
    """One line of the table."""
    return {
        "model": model,
        "scan": scanned,
        "against": reference,
        "scan s": seconds,
        "reference s": other,
        "ratio": seconds / other if ratio is None else ratio,
        "peak MB": None,
    }


def sha256(folder: Path) -> None:
    """Of every safetensors file."""
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)


def quantize(folder: Path) -> None:
    """Every matrix to int8, one after the other, as bitsandbytes does it while loading."""
    reader = open_checkpoint(folder)
    for name, info in reader.tensors.items():
        if len(info.shape) == 2:
            functional.int8_vectorwise_quant(reader.read(name).to(torch.float16))


def peak(function: Callable[[], object]) -> float:
    """Megabytes above the interpreter with its imports."""
    return peak_memory(function, prepare=imports).rss / 1e6


def imports() -> None:
    """What a scan imports, and a first one of almost nothing."""
    scan(random_llama(cache_folder() / "random-llama-tiny", TINY))


def time_of(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def start_up(repeats: int = 5) -> list[dict[str, object]]:
    """Commands in processes of their own, against importing torch."""
    tiny = random_llama(cache_folder() / "random-llama-tiny", TINY)
    commands = {
        "qguard --help": ["--help"],
        "qguard scan, nearly nothing": ["scan", str(tiny)],
    }
    qguard = str(Path(sys.executable).with_name("qguard"))
    reference = [sys.executable, "-c", "import torch"]
    rows = []
    for name, command in commands.items():
        seconds: dict[str, list[float]] = {"scan": [], "reference": []}
        for _ in range(repeats):
            seconds["scan"].append(time_of(partial(run, [qguard, *command])))
            seconds["reference"].append(time_of(partial(run, reference)))
        rows.append(row("start-up", name, "import torch", median(seconds["scan"]), median(seconds["reference"]), None))
    return rows


def run(command: list[str]) -> None:
    """A process of its own, whatever its exit status."""
    subprocess.run(command, capture_output=True, check=False)


if __name__ == "__main__":
    main()
