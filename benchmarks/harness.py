"""What every benchmark script shares: its command line, fair timing, peak memory, and the JSON beside its table.

A script measures into rows (one dictionary a row, the same keys in each) and ends with::

    print_table(rows)
    write("guard_load", rows, arguments.output)
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, object]

_SECONDS_BETWEEN_LOOKS = 0.005

_MEASURED_PACKAGES = (
    "optimum-qguard",
    "torch",
    "transformers",
    "accelerate",
    "optimum",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
    "gptqmodel",
    "llmcompressor",
    "gguf",
    "libgguf",
    "safetensors",
    "numba",
)


def argument_parser(description: str, default_output: Path) -> argparse.ArgumentParser:
    """The command line that every benchmark has: ``device`` (``"cpu"`` or ``"cuda"``) and ``output`` (a path)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs")
    parser.add_argument("--output", type=Path, default=default_output, metavar="FILE", help="JSON file to write")
    return parser


def parse_args(description: str, default_output: Path) -> argparse.Namespace:
    """Parse the command line of a benchmark that has no options of its own."""
    return argument_parser(description, default_output).parse_args()


def machine() -> dict[str, object]:
    """Processor, cores, memory in GiB, and the GPU's name or ``None``."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpu_name(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu_name() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0] or None


def versions() -> dict[str, str]:
    """Python's version and those of the packages that take part, as far as they are installed."""
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    found = {package: installed[package] for package in _MEASURED_PACKAGES if package in installed}
    return {"python": platform.python_version(), **found}


def write(name: str, rows: Sequence[Row], output: Path, sections: Mapping[str, object] | None = None) -> None:
    """Write ``rows`` with the machine and the versions to ``output``, as the benchmark called ``name``.

    Args:
        name, rows, output: as said.
        sections: results of other benchmarks to be kept beside the rows.
    """
    result = {
        "name": name,
        "date": today(),
        "machine": machine(),
        "versions": versions(),
        "rows": [dict(row) for row in rows],
        **({"sections": sections} if sections else {}),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    partial.replace(output)


def today() -> str:
    """UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def day_of(files: Iterable[Path]) -> str:
    """The day (UTC) on which the last of them was written."""
    last = max(file.stat().st_mtime for file in files)
    return datetime.fromtimestamp(last, timezone.utc).date().isoformat()


def earlier_rows(output: Path) -> list[dict[str, Any]]:
    """All rows that ``output`` has, each with the ``date`` it was measured on; none where it is not there."""
    if not output.exists():
        return []
    before = json.loads(output.read_text())
    return [{**row, "date": row.get("date", before["date"])} for row in before["rows"]]


def rows_of_others(output: Path, models: Collection[str]) -> list[dict[str, Any]]:
    """The rows that ``output`` has of models that are not to be measured again; none where it is not there."""
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    return [row for row in rows if row["model"] not in models]


def print_table(rows: Sequence[Row]) -> None:
    """Print ``rows`` under the keys of the first one; floats with four significant digits."""
    table = Table()
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@dataclass(frozen=True)
class Timings:
    """Wall times in seconds of callables that ran in turn: ``seconds[name][i]`` is of round ``i``."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Median time of one callable."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """Median over the rounds of ``name``'s time to ``reference``'s in the same round.

        What slows the machine for a while slows both halves of a pair, so it moves this little.
        """
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(time / base for time, base in pairs)


def alternate(callables: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 1) -> Timings:
    """Time ``callables`` interleaved: every round runs each once, every other round in reverse order.

    Args:
        callables: name to function; results are dropped before the next one starts.
        repeats: how many timed rounds.
        warmup: how many rounds go before them, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for index in range(-warmup, repeats):
        for name in list(callables)[:: -1 if index % 2 else 1]:
            gc.collect()  # what the one before left behind is not this one's
            start = time.perf_counter()
            callables[name]()
            elapsed = time.perf_counter() - start
            if index >= 0:
                seconds[name].append(elapsed)
    return Timings(seconds)


@dataclass(frozen=True)
class Peak:
    """Most memory in use during a call, in bytes over what was in use before it.

    Attributes:
        rss: main memory, pages of mapped files included.
        cuda: what torch had allocated on the current GPU; 0 without one.
        anonymous: main memory without pages of mapped files, which the system can take back, as seen every few
            milliseconds; 0 where the system does not tell.
    """

    rss: int
    cuda: int
    anonymous: int


def peak_memory(function: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> Peak:
    """Run ``function`` in a fresh process and measure its peak memory.

    In that process glibc gives every block of 64 KiB or more back at once. By default it decides from what was freed
    before, and the same load has one peak or twice that.

    Args:
        function: what is measured. It travels by pickle: a function of a module, or a `functools.partial` of one.
        prepare: runs before it, unmeasured (heavy imports).

    Raises:
        RuntimeError: the process failed; its traceback is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(function, prepare, sender))
    with _environment(MALLOC_MMAP_THRESHOLD_=str(1 << 16)):
        process.start()
    sender.close()
    try:
        peak: Peak = receiver.recv()
        return peak
    except EOFError:
        raise RuntimeError(f"measuring {function} failed, see above") from None
    finally:
        process.join()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure_peak(function: Callable[[], object], prepare: Callable[[], object] | None, sender: Connection) -> None:
    if prepare is not None:
        prepare()
    before = _reset_peak_rss()
    cuda = _Cuda()
    with _Anonymous() as anonymous:
        result = function()
    sender.send(Peak(rss=_peak_rss() - before, cuda=cuda.peak(), anonymous=anonymous.peak))
    del result


def _reset_peak_rss() -> int:
    """Make the current resident size the peak, where the system can (Linux), and return the peak."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")
    return _peak_rss()


def _peak_rss() -> int:
    # Not ru_maxrss on Linux: a new process starts with its parent's.
    return _memory("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory(field: str) -> int:
    """What Linux says of this process, in bytes; 0 on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


class _Anonymous(threading.Thread):
    """Watches this process's anonymous memory; ``peak`` is the most over what there was at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()

    def __enter__(self) -> _Anonymous:
        self._before = _memory("RssAnon:")
        self.peak = 0
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, _memory("RssAnon:") - self._before)
            if self._done.wait(_SECONDS_BETWEEN_LOOKS):
                return


class _Cuda:
    """Peak of torch's allocations from here on, if torch is loaded and a GPU is there."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self._cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated()

    def peak(self) -> int:
        return 0 if self._cuda is None else self._cuda.max_memory_allocated() - self._before
