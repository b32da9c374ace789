"""Encrypting and decrypting a checkpoint against copying it: wall time, and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from harness import RESULTS, alternate, argument_parser, peak_memory, print_table, write
from random_llama import random_llama
from transformers import LlamaConfig

from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import decrypt_checkpoint, encrypt_checkpoint
from optimum_qguard.evaluate.cache import cache_folder

KEY = Key(bytes(range(32)))
SHARD_BYTES = 530_000_000
# 4.0 GB in 8 files, and a quarter of it for the memory to be compared.
CONFIGS: Mapping[str, LlamaConfig] = {
    f"{layers} layers": LlamaConfig(
        hidden_size=2560,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    for layers in (24, 6)
}


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "encrypt_io.json")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one that is not timed")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="files written at the same time")
    parser.add_argument("--clean", action="store_true", help="delete what was made, and stop")
    arguments = parser.parse_args()
    work = cache_folder() / "encrypt-io"
    if arguments.clean:
        shutil.rmtree(work, ignore_errors=True)
        return
    rows = []
    for name, config in CONFIGS.items():
        plain = random_llama(work / name.replace(" ", "-"), config, SHARD_BYTES)
        rows += measure(plain, work, arguments.repeats, arguments.workers)
        write("encrypt_io", rows, arguments.output)
    print_table(rows)


def measure(plain: Path, work: Path, repeats: int, workers: list[int]) -> list[dict[str, object]]:
    """One row for each direction and number of workers."""
    encrypted, out = work / "encrypted", work / "out"
    encrypt(plain, encrypted, 2)
    runs: dict[str, Callable[[], None]] = {"cp": partial(copy, plain, out)}
    runs |= {f"encrypt {count}": partial(encrypt, plain, out, count) for count in workers}
    runs |= {f"decrypt {count}": partial(decrypt, encrypted, out, count) for count in workers}
    timings = alternate(runs, repeats)
    size = sum(file.stat().st_size for file in plain.glob("*.safetensors"))
    rows = []
    for direction, source, function in (("encrypt", plain, encrypt), ("decrypt", encrypted, decrypt)):
        for count in workers:
            name = f"{direction} {count}"
            peak = peak_memory(partial(function, source, out, count))
            rows.append(
                {
                    "GB": size / 1e9,
                    "files": len(list(plain.glob("*.safetensors"))),
                    "direction": direction,
                    "workers": count,
                    "s": timings.median(name),
                    "cp s": timings.median("cp"),
                    "ratio to cp": timings.ratio(name, "cp"),
                    "GB/s": size / 1e9 / timings.median(name),
                    "peak MB": peak.rss / 1e6,
                }
            )
    for folder in (encrypted, out):
        shutil.rmtree(folder)
    return rows


def copy(source: Path, out: Path) -> None:
    """``cp`` and fsync, as both of the others do."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def encrypt(source: Path, out: Path, workers: int) -> None:
    """Streaming, every tensor verified."""
    shutil.rmtree(out, ignore_errors=True)
    encrypt_checkpoint(source, out, key=KEY, workers=workers)


def decrypt(source: Path, out: Path, workers: int) -> None:
    """Streaming, every tensor checked against the manifest."""
    shutil.rmtree(out, ignore_errors=True)
    decrypt_checkpoint(source, out, key=KEY, workers=workers)


if __name__ == "__main__":
    main()
