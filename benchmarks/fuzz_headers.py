"""Fuzzes the readers of headers, indices and JSON, guided by coverage (needs atheris).

    pip install atheris
    python benchmarks/fuzz_headers.py --seconds 600 --corpus tests/checkpoint/corpus

An input's first byte chooses the reader. Whatever the rest is, the reader gives what the real safetensors library
agrees with, or one `CheckpointError` in one printable line; anything else stops the run with the input in a file.
Inputs that reach new code are added to the corpus; tests/checkpoint/test_corpus.py replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from safetensors import deserialize

try:
    import atheris
except ImportError:  # replaying needs none
    atheris = None

with contextlib.nullcontext() if atheris is None else atheris.instrument_imports(include=["optimum_qguard.checkpoint"]):
    from optimum_qguard.checkpoint import CheckpointError
    from optimum_qguard.checkpoint.header import parse_header
    from optimum_qguard.checkpoint.index import parse_index
    from optimum_qguard.checkpoint.json_object import parse_object

_LONGEST_INPUT = 4096


def replay(content: bytes) -> str:
    """Give an input to its reader; says what became of it: ``"read"`` or ``"refused"``.

    Raises:
        AssertionError: the reader broke its promise.
    """
    reader, content = content[:1], content[1:]
    try:
        if reader == b"i":
            shards = parse_index(content, "index").shards
            assert shards
            assert all(name.endswith(".safetensors") and "/" not in name and "\\" not in name for name in shards)
        elif reader == b"j":
            parse_object(content).items()
        else:
            _check_header(content)
    except CheckpointError as error:
        problem = str(error)
    except ValueError:
        if reader != b"j":  # the others know their own error only
            raise
        return "refused"
    else:
        return "read"
    assert problem.isprintable(), problem
    return "refused"


def _check_header(content: bytes) -> None:
    header = parse_header(lambda start, length: content[start : start + length], len(content), "model.safetensors")
    found = {info.name: (info.shape, info.n_bytes) for info in header.tensors}
    real = {name: (tuple(info["shape"]), len(info["data"])) for name, info in deserialize(content)}
    assert found == real, (found, real)


def _mutate(content: bytes, longest: int, seed: int) -> bytes:
    """Random bytes, but two times of three with a header length that is right, behind which there is more to find."""
    changed = bytes(atheris.Mutate(content, longest))
    end = changed.rfind(b"}") + 1
    if seed % 3 and changed[:1] not in (b"i", b"j") and end > 9:
        changed = changed[:1] + (end - 9).to_bytes(8, "little") + changed[9:]
    return changed[:longest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of inputs to start from and add to")
    parser.add_argument("--artifacts", default="./", help="where an input that breaks a promise is put")
    args = parser.parse_args()
    begin = time.monotonic()
    counts = {"read": 0, "refused": 0}

    def one(content: bytes) -> None:
        counts[replay(content)] += 1
        if sum(counts.values()) % 200_000 == 0:
            print(f"{time.monotonic() - begin:.0f} s: {counts}", flush=True)

    flags = [
        f"-max_total_time={args.seconds}",
        f"-max_len={_LONGEST_INPUT}",
        f"-artifact_prefix={args.artifacts}",
        "-rss_limit_mb=2048",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(args.corpus)], one, custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
