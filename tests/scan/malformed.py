"""Repositories that are broken or rigged, each in one way, and one that is sound."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from tests.checkpoint.headers import entry, file_with

CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "dtype": "float32"}
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00002.safetensors"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("up", "down")}
    found = {name: torch.randn(32, 32, generator=generator) for name in sorted(names)}
    found["model.embed_tokens.weight"] = torch.randn(64, 32, generator=generator)
    return found


def sound(folder: Path, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    save_file(tensors() | more, folder / MODEL, {"format": "pt"})
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    total = 0
    for number in (1, 2):
        part = dict(sorted(tensors().items())[number - 1 :: 2])
        save_file(part, folder / SHARD.format(number), {"format": "pt"})
        weight_map |= dict.fromkeys(part, SHARD.format(number))
        total += sum(tensor.nbytes for tensor in part.values())
    write_index(folder, weight_map, total)
    return folder


def write_index(folder: Path, weight_map: Any, total: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def edit_index(folder: Path, **weight_map: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= weight_map
    (folder / INDEX).write_text(json.dumps(index))


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/qguard-was-here",)


def _content(content: bytes, name: str = MODEL) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (sound(folder) / name).write_bytes(content)

    return build


def _damaged(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        path = sound(folder) / MODEL
        path.write_bytes(damage(path.read_bytes()))

    return build


def _with_index(weight_map: Any, total: Any = 0) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write_index(sharded(folder), weight_map, total)

    return build


def _link(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    sound(folder)
    (folder / MODEL).rename(outside)
    (folder / MODEL).symlink_to(outside)


def _circle(folder: Path) -> None:
    (sound(folder) / "more.safetensors").symlink_to("more.safetensors")


def _linked_folder(folder: Path) -> None:
    outside = folder.parent / "more"
    sound(outside)
    (sound(folder) / "more").symlink_to(outside)


def _missing(folder: Path) -> None:
    (sharded(folder) / SHARD.format(2)).unlink()


def _no_index(folder: Path) -> None:
    _missing(folder)
    (folder / INDEX).unlink()


def _twice(folder: Path) -> None:
    shard = sharded(folder) / SHARD.format(2)
    save_file(tensors(1), shard)


def _exploit(folder: Path) -> None:
    (sound(folder) / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit()))


def _zip_exploit(folder: Path) -> None:
    torch.save({"a": Exploit()}, sound(folder) / "optimizer.pt")


def _zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(sound(folder) / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04\x8e" + (3 << 30).to_bytes(8, "little") + bytes(50 << 20))


def _directory(folder: Path) -> None:
    (sound(folder) / MODEL).unlink()
    (folder / MODEL).mkdir()


def _strange_names(folder: Path) -> None:
    sound(folder)
    for letter in (b"\x1b[2J", b"\xff\xfe", b"\n"):
        path = os.fsencode(folder) + b"/" + letter + b".safetensors"
        with open(path, "wb") as stream:  # noqa: PTH123  bytes that are no text
            stream.write(save({"model.layers.9.weight": torch.full((32, 32), float("nan"))}))


def _numbers(value: float) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        weight = torch.randn(32, 32)
        weight[3, 5] = value
        sound(folder, **{"model.layers.2.mlp.up_proj.weight": weight})

    return build


def _header(header: Any, data: bytes = bytes(16)) -> Callable[[Path], None]:
    return _content(file_with(header, data))


def _sparse(shape: list[int], model_type: str = "llama") -> Callable[[Path], None]:
    """A sound file of zeros, of which nearly none are on the disk."""

    def build(folder: Path) -> None:
        sound(folder, {"model_type": model_type})
        n_bytes = 4 * math.prod(shape)
        content = file_with({"h.0.c_fc.weight": entry(shape=shape, offsets=[0, n_bytes])})
        (folder / MODEL).write_bytes(content)
        os.truncate(folder / MODEL, len(content) + n_bytes)

    return build


REPOSITORIES: dict[str, Callable[[Path], Any]] = {
    "empty file": _content(b""),
    "cut in its data": _damaged(lambda content: content[:-1]),
    "cut in its header": _damaged(lambda content: content[:60]),
    "longer than it says": _damaged(lambda content: content + b"\0"),
    "random bytes": _content(bytes(range(256)) * 8),
    "a pickle by another name": _content(pickle.dumps(Exploit())),
    "LFS pointer": _content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
    "header of 10^18": _content((10**18).to_bytes(8, "little") + b"{}"),
    "header of 2^64": _content(b"\xff" * 16),
    "header no JSON": _header(b"{'a': 1}"),
    "header a list": _header([]),
    "header nested": _header(b'{"a":' * 50_000),
    "header of brackets": _header(b'{"a":[' + b"[]," * 500_000 + b"0]}"),
    "shape of 10^18": _header({"a": entry(shape=[10**18, 10**18])}),
    "negative shape": _header({"a": entry(shape=[-2, -2])}),
    "negative offsets": _header({"a": entry(offsets=[-16, 0])}),
    "overlap": _header({"a": entry(), "b": entry()}),
    "gap": _header({"a": entry(offsets=[4, 20])}, bytes(20)),
    "names twice": _header(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "escapes in a name": _header({"\x1b]0;owned\x07": entry()}),
    "half character": _header(b'{"\\ud800":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "unknown dtype": _header({"a": entry("F7\x1b[31m")}),
    "a folder by that name": _directory,
    "link out of the folder": _link,
    "link in a circle": _circle,
    "link to a folder": _linked_folder,
    "shard missing": _missing,
    "shard missing without an index": _no_index,
    "index no JSON": _content(b"{", INDEX),
    "index nested": _content(b'{"weight_map":' * 50_000, INDEX),
    "index of escapes": _with_index({"a": "\x1b[2J.safetensors"}),
    "index of numbers": _with_index({"a": 1}),
    "index leaves the folder": _with_index({"a": "../../etc/x.safetensors"}),
    "index to an absolute path": _with_index({"a": "/etc/passwd"}),
    "index names a tensor that is not there": lambda folder: edit_index(sharded(folder), ghost=SHARD.format(1)),
    "tensor in two shards": _twice,
    "vector of 40 GB": _sparse([10**10]),
    "rows of 40 GB": _sparse([1, 10**10]),
    "rows of 400 MB": _sparse([255, 10**6 + 1]),
    "columns of 40 GB": _sparse([10**5, 10**5], "gpt2"),
    "config no JSON": _content(b"\xff\xfe{", "config.json"),
    "config nested": _content(b'{"a":' * 50_000, "config.json"),
    "config a list": _content(b"[]", "config.json"),
    "manifest no JSON": _content(b"{", "qguard.json"),
    "manifest of escapes": _content(b'{"kind": "encrypted", "files": {"\\u001b[2J": 7}}', "qguard.json"),
    "NaN": _numbers(float("nan")),
    "infinite": _numbers(float("-inf")),
    "file names of escapes": _strange_names,
    "pickle that runs code": _exploit,
    "zip that runs code": _zip_exploit,
    "zip that fills the memory": _zip_bomb,
    "pickle of nothing": _content(b"", "rng_state.pth"),
    "GGUF alone": lambda folder: (folder.mkdir(), (folder / "model.gguf").write_bytes(b"GGUF")),
    "nothing": lambda folder: folder.mkdir(),
}
