from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_qguard.checkpoint.header import MAX_HEADER_BYTES
from optimum_qguard.checkpoint.json_object import parse_object

objects = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(objects)
def test_what_json_writes_is_read(content: dict[str, Any]) -> None:
    for strict in (False, True):
        assert parse_object(json.dumps(content).encode(), strict=strict) == content
        assert parse_object(json.dumps(content, ensure_ascii=False).encode(), strict=strict) == content


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_random_bytes_are_an_object_or_a_value_error(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_object(content), dict)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"{}{}",
        '{"a": 1}'.encode("utf-16"),
        b"\xff{}",
        b'{"a": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 9_000,
        b'{"a":[' + b"[]," * 50_000 + b"[]]}",
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_anything_else_is_refused(content: bytes, strict: bool) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any
        parse_object(content, strict=strict)


def test_names_that_stand_twice() -> None:
    assert parse_object(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="twice"):
        parse_object(b'{"a": 1, "a": 2}', strict=True)


MEASURE = """
import resource, sys
from pathlib import Path
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint.header import read_header
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in sys.argv[2:]:
    try:
        header = read_header(Path(name))
        print(len(header.tensors))
    except CheckpointError as error:
        print("refused")
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_a_header_is_made_of(tmp_path: Path) -> None:
    """500 MB above the interpreter: the kernel refuses more."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    entry = b'"%s%06d":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}'
    many = b"{" + b",".join(entry % (b"layer.weight." * 5, n) for n in range(100_000)) + b"}"

    def filled(piece: bytes) -> bytes:
        return b'{"a":[' + piece * ((MAX_HEADER_BYTES - 10) // len(piece)) + b"0]}"

    fillings = {
        "many": many,
        "brackets": filled(b"[],"),
        "objects": filled(b'{"a":257},257,257,'),
        "names": b"{" + b",".join(b'"%x":0' % n for n in range(1_500_000)) + b"}",
    }
    files = []
    for name, text in fillings.items():
        path = tmp_path / name
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        files.append(str(path))
    command = [sys.executable, "-c", MEASURE, str(500 << 20), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["100000"] + ["refused"] * (len(files) - 1)
