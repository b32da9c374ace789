"""Every file that the header parser takes, the real safetensors library takes too, and finds the same tensors in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header
from tests.checkpoint.headers import Described, entry, file_with, oracle

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

WHOLE = save(
    {
        "model.embed.weight": torch.randn(4, 8).bfloat16(),
        "model.norm.weight": torch.ones(8),
        "empty": torch.zeros(0, 3),
        "step": torch.tensor(3),
    },
    {"format": "pt"},
)


def parse(content: bytes) -> Header:
    return parse_header(lambda start, length: content[start : start + length], len(content), "model.safetensors")


def check(content: bytes) -> str | None:
    """The error; ``None`` if the file is taken and the real library agrees."""
    try:
        header = parse(content)
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable()
        assert "model.safetensors: " in message
        assert len(message) < 2000
        return message
    data = sum(info.n_bytes for info in header.tensors)
    assert header.n_bytes == len(content)
    assert header.raw == content[: len(content) - data]
    found: Described = {
        info.name: (str(json.loads(header.raw[8:])[info.name]["dtype"]), info.shape, info.n_bytes)
        for info in header.tensors
    }
    assert found == oracle(content)
    return None


def test_what_safetensors_writes_is_taken() -> None:
    assert check(WHOLE) is None
    assert {info.name: info.shape for info in parse(WHOLE).tensors} == {
        "model.embed.weight": (4, 8),
        "model.norm.weight": (8,),
        "empty": (0, 3),
        "step": (),
    }


DATA = b"\0" * 16
LIES: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "length 10^18": (10**18).to_bytes(8, "little") + b"{}",
    "length 2^64 - 1": b"\xff" * 8 + b"{}",
    "length 0": bytes(8),
    "length behind the end": file_with(b"{}")[:-1],
    "no JSON": file_with(b"{"),
    "list": file_with([]),
    "number": file_with(b"7"),
    "null": file_with(b"null"),
    "UTF-16": file_with('{"a": 1}'.encode("utf-16")),
    "BOM": file_with(b"\xef\xbb\xbf{}"),
    "NUL": file_with(b"{}\0"),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "nested 10^5 deep": file_with(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "objects 10^5 deep": file_with(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "twice": file_with(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), DATA),
    "field twice": file_with(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2,2],"data_offsets":[0,16]}}', DATA),
    "metadata twice": file_with(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "metadata a list": file_with({"__metadata__": []}),
    "metadata null": file_with({"__metadata__": None}),
    "metadata of numbers": file_with({"__metadata__": {"a": 1}}),
    "metadata of half characters": file_with(b'{"__metadata__":{"a":"\\ud800"}}'),
    "half character": file_with(b'{"\\udfff":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', DATA),
    "escapes in a name": file_with({"\x1b]0;owned\x07\x1b[2J": entry()}, DATA),
    "line in a name": file_with({"a\nb": entry()}, DATA),
    "backwards name": file_with({"a\u202eb": entry()}, DATA),
    "long name": file_with({"a" * 100_000: entry()}, DATA),
    "entry null": file_with({"a": None}),
    "no dtype": file_with({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, DATA),
    "one thing more": file_with({"a": entry() | {"code": "x"}}, DATA),
    "dtype of escapes": file_with({"a": entry("\x1b[31m")}, DATA),
    "dtype a list": file_with({"a": entry(["F32"])}, DATA),
    "unknown dtype": file_with({"a": entry("F7")}, DATA),
    "shape a number": file_with({"a": entry(shape=4)}, DATA),
    "shape of 10^18": file_with({"a": entry(shape=[10**18])}, DATA),
    "shape of 10^18 squared": file_with({"a": entry(shape=[10**18, 10**18])}, DATA),
    "shape that overflows to 4": file_with({"a": entry(shape=[2**62 + 1, 4])}, DATA),
    "shape 10^5000": file_with(b'{"a":{"dtype":"F32","shape":[1%b],"data_offsets":[0,16]}}' % (b"0" * 5000), DATA),
    "negative shape": file_with({"a": entry(shape=[-2, -2])}, DATA),
    "minus zero": file_with(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "float shape": file_with({"a": entry(shape=[2.0, 2])}, DATA),
    "boolean shape": file_with({"a": entry("F64", [True, 2])}, DATA),
    "text shape": file_with({"a": entry(shape=["2", 2])}, DATA),
    "too many dimensions": file_with({"a": entry(shape=[1] * 1000, offsets=[0, 4])}, DATA[:4]),
    "negative offsets": file_with({"a": entry(offsets=[-16, 0])}, DATA),
    "offsets backwards": file_with({"a": entry(offsets=[16, 0])}, DATA),
    "boolean offsets": file_with({"a": entry("U8", [1], [False, True])}, b"\0"),
    "float offsets": file_with({"a": entry(offsets=[0.0, 16.0])}, DATA),
    "three offsets": file_with({"a": entry(offsets=[0, 16, 16])}, DATA),
    "offsets behind the end": file_with({"a": entry(offsets=[16, 32])}, DATA),
    "offsets of 2^64": file_with({"a": entry(offsets=[2**64, 2**64 + 16])}, DATA),
    "offsets into the header": file_with({"a": entry(offsets=[-8, 8])}, DATA),
    "overlap": file_with({"a": entry(), "b": entry(offsets=[8, 24])}, DATA + DATA[:8]),
    "same bytes": file_with({"a": entry(), "b": entry()}, DATA),
    "gap": file_with({"a": entry(), "b": entry(offsets=[20, 36])}, DATA + DATA + bytes(4)),
    "rest": file_with({"a": entry()}, DATA + b"\0"),
    "cut": file_with({"a": entry()}, DATA[:-1]),
    "length against shape": file_with({"a": entry(shape=[2, 3])}, DATA),
    "NaN": file_with(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', DATA),
    "brackets": file_with(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "empty objects": file_with(b'{"a":[' + b'{"":0},' * 1_000_000 + b"0]}"),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_lies_are_refused_in_one_line(content: bytes) -> None:
    assert check(content) is not None


def test_a_header_that_is_too_long_is_not_even_read() -> None:
    def read(start: int, length: int) -> bytes:
        assert (start, length) == (0, 8)
        return (MAX_HEADER_BYTES + 1).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match="which no model needs"):
        parse_header(read, 1 << 40, "model.safetensors")


STRICTER = {
    "twice",
    "metadata twice",
    "escapes in a name",
    "line in a name",
    "backwards name",
    "long name",
    "one thing more",
    "too many dimensions",
    "metadata null",
}


def test_where_it_is_stricter_than_safetensors() -> None:
    assert {name for name, content in LIES.items() if oracle(content) is not None} == STRICTER


@pytest.mark.parametrize(
    "content",
    [
        file_with({}),
        file_with({"": entry()}, DATA),
        file_with({"größe 量": entry()}, DATA),
        file_with(b"{}   "),
        file_with({"__metadata__": {"note": "\x1b[2J"}}),
        file_with({"b": entry(offsets=[16, 32]), "a": entry()}, DATA * 2),
        file_with({"a": entry("F4", [32], [0, 16])}, DATA),
        file_with({"a": entry("F32", [0, 10**18], [0, 0])}),
        file_with(b'{"\\ud83d\\ude00":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', DATA),
    ],
    ids=["empty", "no name", "letters", "padding", "metadata", "order", "half bytes", "no elements", "pair"],
)
def test_odd_files_are_taken(content: bytes) -> None:
    assert check(content) is None


@fuzz
@given(st.binary(max_size=200))
def test_random_bytes(content: bytes) -> None:
    check(content)


@fuzz
@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "digit", "end"]))
        if what == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif what == "insert":
            content[at:at] = data.draw(st.binary(max_size=8))
        elif what == "end":
            del content[at:]
        elif at < len(content) and chr(content[at]).isdigit():
            content[at] = ord(data.draw(st.sampled_from("0123456789")))
    if data.draw(st.booleans()):  # a header whose length is right gets further
        length = int.from_bytes(WHOLE[:8], "little") + len(content) - len(WHOLE)
        content[:8] = max(length, 0).to_bytes(8, "little")
    check(bytes(content))


size = st.one_of(
    st.integers(0, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**18, -1, -(10**18)])
)
anything = st.recursive(
    st.none() | st.booleans() | size | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16", "F4", "I8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
dtypes = st.sampled_from(["F32", "BF16", "F16", "U8", "BOOL", "F8_E4M3", "F4", "F64", "C64", "F6_E2M3", "f32", ""])
entries = st.fixed_dictionaries(
    {
        "dtype": dtypes | anything,
        "shape": st.lists(size, max_size=3) | anything,
        "data_offsets": st.tuples(size, size).map(sorted) | anything,
    },
    optional={"more": anything},
)
names = st.sampled_from(["a", "b", "__metadata__", "", "\x1b[2J", "a\0b"]) | st.text(max_size=4)


@fuzz
@given(st.dictionaries(names, entries | anything, max_size=4), st.integers(0, 64))
def test_structured_lies(header: dict[str, Any], n_bytes: int) -> None:
    check(file_with(header, bytes(n_bytes)))


@fuzz
@given(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 3), max_size=3)), max_size=5), st.data())
def test_files_that_nearly_add_up(tensors: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    """Sound files, but perhaps for one number."""
    bits = {"F32": 32, "BF16": 16, "F16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F4": 4, "F64": 64, "C64": 64}
    header: dict[str, Any] = {}
    end = 0
    for number, (dtype, shape) in enumerate(tensors):
        assume(dtype in bits)
        elements = 1
        for length in shape:
            elements *= length
        start, end = end, end + elements * bits[dtype] // 8
        header[f"t{number}"] = entry(dtype, shape, [start, end])
    if header and data.draw(st.booleans()):
        victim = header[data.draw(st.sampled_from(sorted(header)))]
        field = victim[data.draw(st.sampled_from(["shape", "data_offsets"]))]
        if field:
            field[data.draw(st.integers(0, len(field) - 1))] += data.draw(st.sampled_from([-1, 1, 2**63, 2**64]))
    check(file_with(header, bytes(max(end + data.draw(st.sampled_from([0, 0, 0, 1, -1])), 0))))
