"""What guard, or a key, adds to loading a model: plain against guarded ``from_pretrained``, in turn, in one process."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import RESULTS, alternate, argument_parser, peak_memory, print_table, write
from random_llama import ONE_BILLION, TINY, random_llama
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import disable_progress_bar

from optimum_qguard import Key, QGuardConfig, QGuardUnlockConfig, encrypt_checkpoint
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.guard import noise
from optimum_qguard.guard.backends import preset

RANDOM_LLAMA = cache_folder() / "random-llama-1b"
TINY_LLAMA = cache_folder() / "random-llama-tiny"
MODELS: Mapping[str, Callable[[], Path]] = {
    "SmolLM2-135M": smollm2_path,
    "Llama-1B": partial(random_llama, RANDOM_LLAMA, ONE_BILLION),
}
BACKENDS = ("bnb-int8", "bnb-nf4", "torchao-int8", "quanto-int8")
UNLOCKED = "unlocked"
KEY = Key(bytes(range(32)))


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "guard_load.json")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs of loads, after one that is not timed")
    parser.add_argument("--unlock", choices=BACKENDS, default="bnb-int8", help="the backend of encrypted checkpoints")
    parser.add_argument("--clean", action="store_true", help="delete the random models that were made, and stop")
    arguments = parser.parse_args()
    if arguments.clean:
        for folder in (RANDOM_LLAMA, TINY_LLAMA):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(encrypted(folder), ignore_errors=True)
        return
    disable_progress_bar()
    tiny = random_llama(TINY_LLAMA, TINY)
    rows = []
    for model in arguments.models:
        path = MODELS[model]()
        for backend in arguments.backends:
            figures = measure(path, backend, arguments.device, arguments.repeats, tiny)
            rows.append({"model": model, "backend": backend, **figures})
            write("guard_load", rows, arguments.output)
        if arguments.unlock in arguments.backends:
            made_once(encrypted(path), partial(encrypt, path))
            made_once(encrypted(tiny), partial(encrypt, tiny))
            figures = measure(path, arguments.unlock, arguments.device, arguments.repeats, tiny, unlock=True)
            rows.append({"model": model, "backend": arguments.unlock, **figures})
            write("guard_load", rows, arguments.output)
    print_table(rows)


def encrypted(path: Path) -> Path:
    """Where a model's encrypted copy is."""
    return cache_folder() / f"{path.name}-encrypted"


def encrypt(path: Path, folder: Path) -> None:
    """Make it."""
    encrypt_checkpoint(path, folder, key=KEY)


def measure(
    path: Path, backend: str, device: str, repeats: int, warm_up_with: Path, *, unlock: bool = False
) -> dict[str, object]:
    """The figures of one model and backend.

    Peaks are of the process (``device="cpu"``) or of torch's allocations on the GPU, each from a process of its own.

    Args:
        path: folder of the model.
        backend: a preset.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: timed pairs.
        warm_up_with: folder of a small model of the same architecture, loaded first so that no import is measured.
        unlock: instead of guarding, load the encrypted copy with its key.
    """
    how = UNLOCKED if unlock else "guarded"
    warm_up(warm_up_with, backend, device, how)
    read = read_seconds(path)
    methods: set[str] = set()

    def guarded() -> None:
        model = load(path, backend, device, how)
        methods.update({UNLOCKED} if unlock else {tensor.method for tensor in model.qguard_report.tensors})

    timings = alternate({"plain": partial(load, path, backend, device), "guarded": guarded}, repeats)
    prepare = partial(warm_up, warm_up_with, backend, device, how)
    peaks = {}
    for name, each in (("plain", "plain"), ("guarded", how)):
        peak = peak_memory(partial(load, path, backend, device, each), prepare=prepare)
        peaks[name] = (peak.rss if device == "cpu" else peak.cuda) / 1e6
    return {
        "method": " and ".join(sorted(methods)),
        "plain s": timings.median("plain"),
        "guarded s": timings.median("guarded"),
        "time ratio": timings.ratio("guarded", "plain"),
        "plain peak MB": peaks["plain"],
        "guarded peak MB": peaks["guarded"],
        "peak ratio": peaks["guarded"] / peaks["plain"],
        "reading s": read,
        "quantizer s": quantizer_seconds(path, backend, device),
    }


def load(path: Path, backend: str, device: str, how: str = "plain") -> Any:
    """What is measured: ``"plain"``, ``"guarded"``, or the encrypted copy ``"unlocked"``."""
    config = preset(backend)
    if how == "guarded":
        config = QGuardConfig(config)
    elif how == UNLOCKED:
        path, config = encrypted(path), QGuardUnlockConfig(config, key=KEY)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": device})
    if device == "cuda":
        torch.cuda.synchronize()
    return model


def warm_up(path: Path, backend: str, device: str, how: str) -> None:
    """Have everything imported and every kernel loaded that either side needs."""
    disable_progress_bar()
    with patch.object(noise, "COMPILED_FROM", 0):
        for each in ("plain", how):
            load(path, backend, device, each)
    gc.collect()


def read_seconds(path: Path) -> float:
    """Time to read the model's files from the page cache, where they are afterwards: the least of three."""
    buffer = bytearray(1 << 24)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for file in path.glob("*.safetensors"):
            with file.open("rb", buffering=0) as weights:
                while weights.readinto(buffer):
                    pass
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def quantizer_seconds(path: Path, backend: str, device: str) -> float:
    """Time of the library's own quantization of the same tensors, which lie in memory on the device."""
    quantizer = AutoHfQuantizer.from_config(preset(backend), pre_quantized=False)
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer.validate_environment(device_map={"": device})
    quantizer.preprocess_model(model=model, dtype=config.dtype, device_map={"": device})
    operation = quantizer.get_quantize_ops()
    seconds = 0.0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if quantizer.param_needs_quantization(model, name):
                    weight = tensors.get_tensor(name).to(device, copy=True)
                    start = time.perf_counter()
                    operation.convert({name: [weight]}, full_layer_name=name, model=model, missing_keys=set())
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds += time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
