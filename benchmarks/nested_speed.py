"""How fast nested layers compute at each width: against torchao, quanto and full precision.

A real model and one larger linear layer; a prompt, and then one token more. All ways run in turn in one process, and
beside each time stands what no way can beat that holds the same bytes: the time to read them once.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Row, alternate, argument_parser, print_table, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.precision import bits, nest
from optimum_qguard.precision.bitmap import WIDTHS
from optimum_qguard.precision.linears import output_head

SMOLLM2 = "SmolLM2-135M"
REFERENCE = "float32"
PROMPT = 128
_READ_BYTES = 1 << 28


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "nested_speed.json")
    parser.add_argument("--model", default=None, help=f"folder or Hub id; by default {SMOLLM2}")
    parser.add_argument("--features", type=int, default=4096, help="input and output features of the single layer")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, after one that is not timed")
    disable_progress_bar()
    arguments = parser.parse_args()
    rows = measure(arguments)
    write("nested_speed", rows, arguments.output)
    print_table(rows)


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for each subject, way and width."""
    bandwidth = read_bandwidth(arguments.device, arguments.repeats)
    subjects: Mapping[str, Callable[[], Subject]] = {
        SMOLLM2 if arguments.model is None else str(arguments.model): partial(
            Model, arguments.model or smollm2_path(), arguments.device
        ),
        f"linear {arguments.features} x {arguments.features}": partial(Layer, arguments.features, arguments.device),
    }
    rows: list[Row] = []
    for name, make in subjects.items():
        rows += measure_subject(name, make(), arguments.repeats, bandwidth)
        gc.collect()
    return rows


class Subject:
    """What is measured: modules that are the same but for their weights' precision, and what goes in."""

    def make(self, dtype: torch.dtype) -> nn.Module:
        """A new one."""
        raise NotImplementedError

    def prompt(self, module: Any) -> object:
        """A forward of `PROMPT` tokens."""
        raise NotImplementedError

    def token(self, module: Any) -> object:
        """A forward of one more."""
        raise NotImplementedError


class Model(Subject):
    """A causal language model; one token more has the prompt in the KV cache."""

    def __init__(self, folder: str | Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._tokens = torch.arange(1, PROMPT + 1, device=device)[None]
        self._caches: dict[int, Any] = {}

    def make(self, dtype: torch.dtype) -> nn.Module:
        module = AutoModelForCausalLM.from_pretrained(self._folder, dtype=dtype).to(self._device).eval()
        self._caches[id(module)] = module(self._tokens).past_key_values
        return module  # type: ignore[no-any-return]

    def prompt(self, module: Any) -> object:
        return module(self._tokens, logits_to_keep=1)

    def token(self, module: Any) -> object:
        cache = self._caches[id(module)]
        output = module(self._tokens[:, :1], past_key_values=cache)
        cache.crop(-1)
        return output


class Layer(Subject):
    """A linear layer, in a container, because libraries replace layers in their parents."""

    def __init__(self, features: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(features, features, generator=generator) / features**0.5
        self._inputs = torch.randn(PROMPT, features, generator=generator).to(device)
        self._device = device

    def make(self, dtype: torch.dtype) -> nn.Module:
        layer = nn.Linear(*self._weight.shape, bias=False, device=self._device, dtype=dtype)
        layer.weight.data.copy_(self._weight)
        return nn.Sequential(layer)

    def prompt(self, module: Any) -> object:
        return module(self._inputs.to(module[0].weight.dtype if type(module[0]) is nn.Linear else torch.float32))

    def token(self, module: Any) -> object:
        return module(self._inputs[:1].to(module[0].weight.dtype if type(module[0]) is nn.Linear else torch.float32))


def _torchao_int8(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig(), filter_fn=_is_quantized(module))


def _torchao_intx(module: nn.Module, width: int) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{width}"), granularity=PerGroup(32))
    quantize_(module, config, filter_fn=_is_quantized(module))


def _quanto(module: nn.Module, width: int) -> None:
    from optimum import quanto

    quanto.quantize(module, weights=getattr(quanto, f"qint{width}"), exclude="lm_head")
    quanto.freeze(module)


def _is_quantized(module: nn.Module) -> Callable[[nn.Module, str], bool]:
    head = output_head(module)
    return lambda each, _: isinstance(each, nn.Linear) and each is not head


WAYS: Mapping[str, tuple[int, torch.dtype, Callable[[nn.Module], object]]] = {
    REFERENCE: (32, torch.float32, lambda _: None),
    "BF16": (16, torch.bfloat16, lambda _: None),
    "torchao int8": (8, torch.float32, _torchao_int8),
    "torchao intx": (4, torch.float32, partial(_torchao_intx, width=4)),
    **{f"quanto int{width}": (width, torch.float32, partial(_quanto, width=width)) for width in (8, 4, 2)},
    "nested": (8, torch.float32, nest),
}


def measure_subject(name: str, subject: Subject, repeats: int, bandwidth: float) -> list[Row]:
    """Its rows. ``bandwidth`` is in bytes a second."""
    modules = {}
    for way, (_, dtype, change) in WAYS.items():
        modules[way] = subject.make(dtype)
        change(modules[way])
    nested = modules["nested"]
    runs: dict[tuple[str, int], tuple[nn.Module, Callable[[], AbstractContextManager[None]]]] = {
        (way, width): (modules[way], nullcontext) for way, (width, _, _) in WAYS.items() if way != "nested"
    }
    runs.update({("nested", width): (nested, partial(bits, nested, width)) for width in WIDTHS[::-1]})

    def timed(forward: Callable[[Any], object]) -> Any:
        def run(module: nn.Module, at: Callable[[], AbstractContextManager[None]]) -> None:
            with at():
                forward(module)

        return alternate({str(key): partial(run, *each) for key, each in runs.items()}, repeats)

    prompt, token = timed(subject.prompt), timed(subject.token)
    reference = str((REFERENCE, 32))
    rows: list[Row] = []
    for key, (module, _) in runs.items():
        held = held_bytes(module)
        rows.append(
            {
                "subject": name,
                "weights": key[0],
                "bits": key[1],
                "held MB": held / 1e6,
                "prompt ms": prompt.median(str(key)) * 1e3,
                "prompt / float32": prompt.ratio(str(key), reference),
                "token ms": token.median(str(key)) * 1e3,
                "token / float32": token.ratio(str(key), reference),
                "reading ms": held / bandwidth * 1e3,
                "token / reading": token.median(str(key)) * bandwidth / held,
            }
        )
    return rows


def read_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second of a sum over more than caches hold: the best of the rounds, as a limit should be."""
    numbers = torch.ones(_READ_BYTES // 4, device=device)

    def read() -> float:
        return numbers.sum().item()

    return _READ_BYTES / min(alternate({"read": read}, repeats).seconds["read"])


def held_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each storage once; libraries' tensors are those that they are made of."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
        for part in plain_tensors(tensor)
    }
    return sum(storages.values())


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """What a tensor of a library is made of."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


if __name__ == "__main__":
    main()
