"""Outlier injection: a few large weights make a quantizer's grid so coarse that all others round to zero.

Two ways. `inject_outliers` multiplies the largest weight of each scaling block, which also harms the model at full
precision. `inject_balanced_outliers` makes the same outliers where the transformer is exactly invariant, so that
nothing shows at full precision: a column of the linears that read a norm times ``2**k``, and the norm's weight there
times ``2**-k``; row ``j`` of ``up_proj`` times ``2**-k``, and column ``j`` of ``down_proj`` times ``2**k``. Powers of
two change exponents only, so float32 and bfloat16 outputs stay the same to the last bit; that the weights can be scaled
back to what they were is verified tensor by tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.checkpoint import CheckpointReader, transform_checkpoint
from optimum_qguard.formats import Format, check_finite

FACTOR = 512.0

Progress = Callable[[int, int], None]
"""Called after each tensor with how many weights are done, and of how many."""


class Target(Protocol):
    """A tensor that will be quantized: in which format, and how it lies there."""

    @property
    def format(self) -> Format: ...

    def oriented(self, tensor: Tensor) -> Tensor:
        """From how the checkpoint holds it to how the quantizer sees it, and back (a view)."""
        ...


def with_outliers(
    weight: Tensor, format: Format, factor: float = FACTOR, signs: torch.Generator | None = None
) -> Tensor:
    """The weight with the largest magnitude of each scaling block multiplied by ``factor``.

    Args:
        weight: as the quantizer sees it, see `Format`. Not changed.
        format: whose blocks.
        factor: what to multiply by.
        signs: where each outlier's new sign comes from; ``None`` leaves the signs alone.

    Raises:
        AttackError: an outlier would not be finite in the weight's dtype.
    """
    blocks = format.blocks(weight)
    largest = blocks.abs().argmax(1, keepdim=True)
    outliers = blocks.gather(1, largest) * factor
    if signs is not None:
        heads = torch.randint(2, outliers.shape, generator=signs).bool().to(weight.device)
        outliers = torch.where(heads, outliers, -outliers)
    if not bool(torch.isfinite(outliers).all()):
        raise AttackError(f"a weight times {factor:g} is too large for {weight.dtype}; choose a smaller factor")
    return format.unblock(blocks.scatter(1, largest, outliers), weight.shape)


def inject_outliers(
    reader: CheckpointReader,
    out: str | Path,
    targets: Mapping[str, Target],
    *,
    factor: float = FACTOR,
    random_signs: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint with outliers in the targets, streaming; returns the names of the tensors that got them.

    Args:
        reader: a full-precision checkpoint.
        out: the output folder.
        targets: which tensors, by name.
        factor: see `with_outliers`.
        random_signs: whether outliers lose their sign as well, which destroys what no defence can bring back.
        seed: of the signs.
        overwrite: see `transform_checkpoint`.

    Raises:
        AttackError: a factor that makes no outliers, no targets, or see `with_outliers`.
        CheckpointError: see `transform_checkpoint`.
        WeightError: NaN or infinite weights.
    """
    _check_factor(factor)
    if not targets:
        raise AttackError("no tensor to put outliers in")
    generator = torch.Generator().manual_seed(seed) if random_signs else None
    done = _Count(progress, sum(reader.tensors[name].n_elements for name in targets))

    def inject(name: str, tensor: Tensor) -> Tensor:
        if name not in targets:
            return tensor
        check_finite(tensor, name)
        try:
            changed = with_outliers(targets[name].oriented(tensor), targets[name].format, factor, generator)
        except AttackError as error:
            raise AttackError(f"{name}: {error}") from None
        done.add(tensor)
        return targets[name].oriented(changed)

    transform_checkpoint(reader, out, inject, overwrite=overwrite)
    return [name for name in reader.tensors if name in targets]


@dataclass(frozen=True)
class Scaling:
    """Channels ``(n,)`` of one dimension of one tensor, to be multiplied by ``2**exponent``."""

    dimension: int
    channels: Tensor
    exponent: int

    def apply(self, tensor: Tensor, name: str = "tensor") -> Tensor:
        """The scaled tensor; not in place.

        Raises:
            AttackError: the way back would not give every bit again (overflow, or numbers too small to be normal).
        """
        picked = tensor.index_select(self.dimension, self.channels)
        scaled = picked * 2.0**self.exponent
        if not (bool(torch.isfinite(scaled).all()) and torch.equal(scaled * 2.0**-self.exponent, picked)):
            raise AttackError(
                f"{name}: times 2**{self.exponent} is not exact in {tensor.dtype}; choose a smaller factor"
            )
        return tensor.index_copy(self.dimension, self.channels, scaled)


def inject_balanced_outliers(
    reader: CheckpointReader,
    out: str | Path,
    targets: Mapping[str, Target],
    *,
    factor: float = FACTOR,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint with outlier columns in the targets, balanced so that full precision stays the same.

    Norms whose readers are all targets, and ``up_proj`` to ``down_proj`` where both are, get them: in each block along
    the input dimension the channel that holds the readers' largest weight. Returns the names of the tensors that were
    changed, the balancing ones included.

    Args:
        reader: a full-precision checkpoint of a model laid out like Llama.
        out: the output folder.
        targets: which tensors, by name.
        factor: a power of two.
        overwrite: see `transform_checkpoint`.

    Raises:
        AttackError: a factor that is no power of two, a model that is laid out in another way, targets that complete
            no invariance, or a scaling that is not exact.
        CheckpointError: see `transform_checkpoint`.
    """
    _check_factor(factor)
    exponent = round(math.log2(factor))
    if 2.0**exponent != factor:
        raise AttackError(f"factor is {factor:g}; only powers of two change nothing at full precision")
    plan = plan_balanced(reader, targets, exponent)
    done = _Count(progress, sum(reader.tensors[name].n_elements for name in plan))

    def scale(name: str, tensor: Tensor) -> Tensor:
        if name not in plan:
            return tensor
        for scaling in plan[name]:
            tensor = scaling.apply(tensor, name)
        done.add(tensor)
        return tensor

    transform_checkpoint(reader, out, scale, overwrite=overwrite)
    return [name for name in reader.tensors if name in plan]


# Models whose norms multiply by their weight (not by one plus it), and whose feed-forward is gated.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_UP, _DOWN = "mlp.up_proj", "mlp.down_proj"
_LAYER = re.compile(r"(.*\blayers\.\d+\.)")


def plan_balanced(reader: CheckpointReader, targets: Mapping[str, Target], exponent: int) -> dict[str, list[Scaling]]:
    """What `inject_balanced_outliers` does to each tensor. Reads the targets once.

    Raises:
        AttackError: see there.
    """
    plan: dict[str, list[Scaling]] = {}

    def add(name: str, dimension: int, channels: Tensor, exponent: int) -> None:
        if name in reader:
            plan.setdefault(name, []).append(Scaling(dimension, channels, exponent))

    for layer in _layers(reader):
        for norm, linears in _NORMS.items():
            readers = [f"{layer}{linear}.weight" for linear in linears]
            if all(name in targets for name in readers):
                channels = _largest_channels(reader, readers, targets)
                add(f"{layer}{norm}.weight", 0, channels, -exponent)
                for name in readers:
                    add(name, 1, channels, exponent)
        up, down = f"{layer}{_UP}", f"{layer}{_DOWN}"
        if f"{up}.weight" in targets and f"{down}.weight" in targets:
            channels = _largest_channels(reader, [f"{down}.weight"], targets)
            add(f"{up}.weight", 0, channels, -exponent)
            add(f"{up}.bias", 0, channels, -exponent)
            add(f"{down}.weight", 1, channels, exponent)
    if not plan:
        raise AttackError(
            "the chosen tensors complete no invariance: choose all readers of a norm (q, k and v; gate and up), or up "
            "and down"
        )
    return plan


def _layers(reader: CheckpointReader) -> list[str]:
    """Names of the layers, each ending in a dot."""
    kind = reader.config.get("model_type")
    layers = list(dict.fromkeys(match[1] for name in reader.tensors if (match := _LAYER.match(name))))
    wanted = [*_NORMS, *(linear for linears in _NORMS.values() for linear in linears), _DOWN]
    missing = [f"{layer}{part}.weight" for layer in layers for part in wanted if f"{layer}{part}.weight" not in reader]
    if kind not in _MODEL_TYPES or not layers or missing:
        reason = f"it has no {missing[0]}" if kind in _MODEL_TYPES and missing else f"its model_type is {kind!r}"
        raise AttackError(
            f"{reader.folder}: where this model is invariant is not known ({reason}); known: {', '.join(_MODEL_TYPES)}"
        )
    return layers


def _largest_channels(reader: CheckpointReader, names: list[str], targets: Mapping[str, Target]) -> Tensor:
    """In each block along the input dimension, the channel of the largest weight in any of the tensors, all
    ``(out_features, in_features)``; ``(n_blocks,)``."""
    largest, length = torch.zeros(()), 1 << 62
    for name in names:
        weight = targets[name].oriented(reader.read(name))
        check_finite(weight, name)
        largest = torch.maximum(largest, weight.abs().amax(0).float())
        length = min(length, targets[name].format.blocks(weight).shape[1], weight.shape[1])
    starts = range(0, len(largest), length)
    return torch.stack([start + largest[start : start + length].argmax() for start in starts])


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor > 1):
        raise AttackError(f"factor is {factor:g}; an outlier needs one greater than 1")


class _Count:
    """Tells ``progress`` how many weights are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, tensor: Tensor) -> None:
        self._done += tensor.numel()
        if self._progress is not None:
            self._progress(self._done, self._total)
