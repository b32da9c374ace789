"""Undo outlier columns that are balanced elsewhere, so that full precision does not show them.

A column of every linear that reads a norm may be multiplied by ``2**k`` if the norm's weight there is divided by it; so
may a column of ``down_proj`` if the row of ``up_proj`` that feeds it is divided. The function stays the same to the
last bit, and a quantizer breaks: all other weights of the block round to zero. It stays the same if one goes back as
well. That is why this may act on suspicion: where it errs, it costs nothing.

A channel is moved back where all of its tensors agree: the typical weights of its columns, against those of all
columns, are larger by at least `_LEAST` octaves, and the balancing weights smaller by about as much. Typical is the
geometric mean: single outliers hardly move it, and it takes a tenth of a median's time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Models whose norms multiply by their weight (not by one plus it), and whose feed-forward is gated.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_UP, _DOWN = "mlp.up_proj", "mlp.down_proj"
_LAYER = re.compile(r"(.*\blayers\.\d+\.)")
_LEAST = 3.0
_DISAGREEMENT = 6.0
_SAMPLED = 256
_ZERO = 2.0**-24


@dataclass(frozen=True)
class Rescaling:
    """One tensor's channels along ``dimension``, to be multiplied by ``2**exponents`` ``(channels,)``."""

    dimension: int
    exponents: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """The rescaled tensor; not in place."""
        shape = [1] * tensor.ndim
        shape[self.dimension] = -1
        return tensor * (2.0**self.exponents).view(shape).to(tensor.device, tensor.dtype)


def find_balanced_outliers(
    files: Sequence[str | Path], model_type: str, quantized: Collection[str]
) -> dict[str, list[Rescaling]]:
    """What to multiply which tensor by, norms and biases included; empty where nothing is out of balance.

    A few rows of each tensor are read.

    Args:
        files: the checkpoint's safetensors files.
        model_type: of its configuration; of others than Llama's kind nothing is known.
        quantized: names of the tensors that will be quantized; others cannot be changed, so their norms are left alone.
    """
    from safetensors import safe_open

    plan: dict[str, list[Rescaling]] = {}
    if model_type not in _MODEL_TYPES or not all(str(file).endswith(".safetensors") for file in files):
        return plan
    # transformers builds models under torch.device("meta"), where a tensor made on the way would hold nothing.
    with ExitStack() as stack, torch.device("cpu"):
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        tensors = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118

        def add(balance: str, linears: Sequence[str], exponents: Tensor) -> None:
            if bool((exponents != 0).any()):
                for name, sign, dimension in [(balance, 1, 0), *((linear, -1, 1) for linear in linears)]:
                    plan.setdefault(name, []).append(Rescaling(dimension, sign * exponents))

        for layer in dict.fromkeys(match[1] for name in tensors if (match := _LAYER.match(name))):
            for norm, parts in _NORMS.items():
                balance, linears = f"{layer}{norm}.weight", [f"{layer}{part}.weight" for part in parts]
                if balance in tensors and all(name in tensors and name in quantized for name in linears):
                    columns = [_columns(tensors[name]) for name in linears]
                    add(balance, linears, _agreed(columns, _octaves(tensors[balance][:])))
            up, down = f"{layer}{_UP}.weight", f"{layer}{_DOWN}.weight"
            if all(name in tensors and name in quantized for name in (up, down)):
                rows = _octaves(tensors[up][:, :_SAMPLED]).mean(1)
                exponents = _agreed([_columns(tensors[down])], rows)
                add(up, [down], exponents)
                bias = f"{layer}{_UP}.bias"
                if bias in tensors:
                    add(bias, [], exponents)
    return plan


def rescaled_channels(rescalings: Iterable[Rescaling]) -> int:
    """How many channels of a tensor change."""
    return sum(int((rescaling.exponents != 0).sum()) for rescaling in rescalings)


def _columns(tensor: Any) -> Tensor:
    """Typical size of each column's weights in octaves, ``(in_features,)``."""
    return _octaves(tensor[:_SAMPLED]).mean(0)


def _agreed(columns: Sequence[Tensor], balance: Tensor) -> Tensor:
    """By how many octaves each channel is out of balance, whole numbers; 0 where its tensors do not agree on it."""
    octaves = torch.stack([*columns, -balance])
    octaves -= octaves.median(1, keepdim=True).values
    least, most = octaves.amin(0), octaves.amax(0)
    agreed = (least >= _LEAST - 1) & (octaves[:-1].mean(0) >= _LEAST) & (most - least <= _DISAGREEMENT)
    return torch.where(agreed, octaves[:-1].mean(0).round(), 0.0)


def _octaves(weights: Tensor) -> Tensor:
    """Of each weight's size, float32; zeros count as `_ZERO`."""
    return weights.abs().float().clamp_(min=_ZERO).log2_()
