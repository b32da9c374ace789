"""The benchmarks measure what they say."""

import json
import mmap
import time
from functools import partial
from pathlib import Path

import harness
import pytest

MIB = 1 << 20


def hold(mebibytes: int) -> bytearray:
    block = bytearray(mebibytes * MIB)
    block[::4096] = b"x" * len(block[::4096])
    return block


def hold_and_release(mebibytes: int) -> None:
    hold(mebibytes)


def map_file(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return sum(mapped[start] for start in range(0, len(mapped), 4096))


def fail() -> None:
    raise RuntimeError("no measurement")


@pytest.mark.parametrize("function", [hold, hold_and_release])
def test_peak_memory_is_what_the_call_held_at_most(function) -> None:
    parent = hold(300)
    peak = harness.peak_memory(partial(function, 128), prepare=partial(hold_and_release, 200))
    assert len(parent) == 300 * MIB
    assert 120 * MIB < peak.rss < 140 * MIB
    assert peak.cuda == 0


def test_pages_of_mapped_files_are_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (128 * MIB))
    mapped = harness.peak_memory(partial(map_file, tmp_path / "file"))
    held = harness.peak_memory(partial(hold, 128))
    assert mapped.rss > 120 * MIB
    assert mapped.anonymous < 10 * MIB
    assert 120 * MIB < held.anonymous < 140 * MIB


def test_peak_memory_of_a_failing_function() -> None:
    with pytest.raises(RuntimeError, match="failed"):
        harness.peak_memory(fail)


def test_alternate_interleaves_and_pairs() -> None:
    order = []
    timings = harness.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert "".join(order) == "baabbaab"
    assert len(timings.seconds["a"]) == len(timings.seconds["b"]) == 3


def test_ratio_is_the_median_of_pairs() -> None:
    timings = harness.Timings({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 2.0]})
    assert timings.ratio("slow", "fast") == 2.0
    assert timings.median("slow") == 4.0


def test_alternate_times_the_call() -> None:
    timings = harness.alternate({"sleep": partial(time.sleep, 0.02)}, repeats=1, warmup=0)
    assert timings.median("sleep") >= 0.02


def test_write_says_where_and_with_what_it_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "new" / "example.json"
    harness.write("example", [{"format": "int8", "ratio": 1.1}], output)
    result = json.loads(output.read_text())
    assert result["name"] == "example"
    assert set(result["machine"]) == {"cpu", "cores", "memory", "gpu"}
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert result["rows"] == [{"format": "int8", "ratio": 1.1}]
    assert [path.name for path in output.parent.iterdir()] == ["example.json"]


def test_rows_of_models_that_are_not_measured_again(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    assert harness.rows_of_others(output, ["a"]) == []
    harness.write("table", [{"model": "a", "x": 1}, {"model": "b", "x": 2}], output)
    assert harness.rows_of_others(output, ["a", "c"]) == [{"model": "b", "x": 2}]
