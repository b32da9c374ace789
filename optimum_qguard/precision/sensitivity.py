"""How much a model's predictions suffer from each layer's quantization, measured one layer and one width at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.precision.bitmap import MAXIMUM, MINIMUM, WIDTHS, BitMap, check_bits
from optimum_qguard.precision.decoding import GROUP_SIZE, ZeroPoint, check_groups, decoded, width_format
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import linear_layers, oriented
from optimum_qguard.precision.suffix import Suffix

MEASURED_WIDTHS = (2, 3, 4, 6)
SEQUENCE = 256
_LEAST_KL = 1e-12
_LARGEST_EXPONENT = 30.0


class GroupSensitivity(BaseModel):
    """One group of layers that get one width.

    Attributes:
        name: of the layer, where it is one.
        modules: its layers.
        weights: how many weights they have.
        kl: by width, the mean over the tokens of ``KL(model || model with only this group quantized)`` in nats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    modules: tuple[str, ...]
    weights: int = Field(gt=0)
    kl: dict[int, float]

    def curve(self) -> dict[int, float]:
        """A divergence for every width from 2 to 8, never larger at more bits.

        Between measured widths its logarithm is interpolated. Beyond them it changes fourfold per bit: divergence from
        the model itself is quadratic in a small error, and a bit halves the error.
        """
        known = {width: math.log(max(value, _LEAST_KL)) for width, value in sorted(self.kl.items())}
        curve: dict[int, float] = {}
        for width in reversed(WIDTHS):
            value = math.exp(_interpolate(known, width))
            curve[width] = max(value, curve.get(width + 1, 0.0))
        return {width: curve[width] for width in WIDTHS}


class Sensitivity(BaseModel):
    """What `measure_sensitivity` found.

    Attributes:
        fingerprint: of the model, the text and how it was measured.
        group_size, mapping: of the formats (see `width_format`).
        tokens: how many the divergences are means over.
        groups: in the model's order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    fingerprint: str
    group_size: int | None
    mapping: ZeroPoint
    tokens: int
    groups: tuple[GroupSensitivity, ...]

    @property
    def weights(self) -> int:
        """How many weights all groups have."""
        return sum(group.weights for group in self.groups)

    def predict(self, widths: Mapping[str, int]) -> float:
        """The divergence of the model with those widths by group, as the sum of what each group does alone."""
        return math.fsum(group.curve()[widths[group.name]] for group in self.groups)

    def average_bits(self, widths: Mapping[str, int]) -> float:
        """``Σ bits · weights / Σ weights``."""
        return sum(widths[group.name] * group.weights for group in self.groups) / self.weights

    def save(self, path: str | Path) -> None:
        """Write it as JSON; ``Sensitivity.load(path) == s`` afterwards.

        Raises:
            CheckpointError: the file cannot be written.
        """
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            PrecisionError: it cannot be read, or is something else.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PrecisionError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise PrecisionError(f"{path}: is no file of measured sensitivities; delete it or name another") from error


def measure_sensitivity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    tokens: int = 512,
    widths: Sequence[int] = MEASURED_WIDTHS,
    groups: Sequence[str] | None = None,
    group_size: int | None = GROUP_SIZE,
    mapping: ZeroPoint = "symmetric",
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Quantize one group of layers at a time to each width, and measure how far the predictions move.

    The widths that are not measured are interpolated (see `GroupSensitivity.curve`). The model comes out exactly as it
    went in. Only the layers from the changed one on are computed anew.

    Args:
        model: a causal language model at full precision; float32 measures small divergences best.
        tokenizer: its tokenizer.
        text: what it predicts.
        tokens: how many tokens of it, at least 2; in whole sequences of 256, or of as many as the model takes.
        widths: the widths to measure.
        groups: patterns of a `BitMap`; layers that the same one matches first have one width. By default every linear
            layer but the output head has its own.
        group_size, mapping: of the formats (see `width_format`).
        cache: a JSON file to keep the measurements in; a run that was stopped goes on where it was.
        progress: is told how many of how many groups are done.

    Raises:
        PrecisionError: too little text, a width out of range, a pattern that matches nothing, a group size that does
            not divide a layer's rows, predictions that are no numbers, or a cache that is of something else.
    """
    for width in widths:
        check_bits(width, "widths")
        width_format(width, group_size, mapping)
    if not widths:
        raise PrecisionError("widths has no width to measure")
    widths = sorted(set(widths))
    ids = _sequences(tokenizer, text, tokens, model)
    modules = group_modules(model, groups)
    linears = linear_layers(model)
    for name in (name for names in modules.values() for name in names):
        check_groups(name, linears[name], group_size)
    found = Sensitivity(
        fingerprint=_fingerprint(model, ids, widths, modules),
        group_size=group_size,
        mapping=mapping,
        tokens=ids.numel(),
        groups=(),
    )
    if cache is not None and Path(cache).exists():
        found = _continued(found, cache)
    if len(found.groups) == len(modules):
        return found
    training = model.training
    model.eval()
    try:
        suffix = Suffix(model, ids.to(model.device))
        reference = _Reference(suffix.logits)
        for name, members in list(modules.items())[len(found.groups) :]:
            first = min(suffix.layer_of(linears[member]) for member in members)
            suffix.prepare(first)
            kl = {}
            for width in widths:
                with decoded(model, dict.fromkeys(members, width), group_size=group_size, mapping=mapping):
                    kl[width] = reference.kl(suffix.run(first))
                if not math.isfinite(kl[width]):
                    raise PrecisionError(
                        f"{name} at {width} bits: the divergence is {kl[width]}, because predictions on this text are "
                        "NaN or infinite; check the model, or measure it in float32"
                    )
            weights = sum(oriented(linears[member]).numel() for member in members)
            group = GroupSensitivity(name=name, modules=members, weights=weights, kl=kl)
            found = found.model_copy(update={"groups": (*found.groups, group)})
            if cache is not None:
                found.save(cache)
            if progress is not None:
                progress(len(found.groups), len(modules))
    finally:
        model.train(training)
    return found


def group_modules(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Layers by group, in the model's order; ``patterns`` as in `measure_sensitivity`.

    Raises:
        PrecisionError: see `BitMap.resolve`.
    """
    if patterns is None:
        names = BitMap({"*": MAXIMUM}).resolve(model)
        return {name: (name,) for name in names}
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        matched = [name for name, bits in BitMap({pattern: MINIMUM}).resolve(model).items() if bits is not None]
        members = [name for name in matched if name not in taken]
        taken.update(members)
        if members:
            found[pattern] = members
    order = {name: index for index, name in enumerate(linear_layers(model))}
    return {pattern: tuple(members) for pattern, members in sorted(found.items(), key=lambda item: order[item[1][0]])}


class _Reference:
    """The model's own predictions."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.flatten(0, -2).float()
        self._log_p = self._logits.log_softmax(-1)
        self._p = self._log_p.exp()

    def kl(self, logits: Tensor) -> float:
        """Mean over the tokens of ``KL(reference || other)``.

        From the differences of the logits, ``d``, with their mean under the reference taken off: ``log Σ p exp(d)``. So
        divergences far below float32's digits of the logits come out right.
        """
        difference = logits.flatten(0, -2).float() - self._logits
        difference -= (self._p * difference).sum(-1, keepdim=True)
        small = difference.amax(-1) < _LARGEST_EXPONENT
        kl = torch.empty(len(difference), dtype=torch.float64)
        kl[small] = (self._p[small] * difference[small].expm1()).sum(-1, dtype=torch.float64).log1p().cpu()
        kl[~small] = (self._log_p[~small] + difference[~small]).logsumexp(-1).double().cpu()
        return float(kl.mean().clamp(min=0))


def _interpolate(known: Mapping[int, float], width: int) -> float:
    below = [each for each in known if each <= width]
    above = [each for each in known if each >= width]
    if not below:
        return known[above[0]] + (above[0] - width) * math.log(4)
    if not above:
        return known[below[-1]] - (width - below[-1]) * math.log(4)
    low, high = below[-1], above[0]
    part = 0.0 if low == high else (width - low) / (high - low)
    return known[low] + part * (known[high] - known[low])


def _sequences(tokenizer: Any, text: str, tokens: int, model: Any) -> Tensor:
    ids = torch.tensor(tokenizer(text)["input_ids"][:tokens])
    longest = min(SEQUENCE, getattr(model.config, "max_position_embeddings", SEQUENCE))
    if tokens < 2 or len(ids) < tokens:
        raise PrecisionError(
            f"the text has {len(ids)} token(s) and {tokens} were asked for; give at least 2 and no more than it has"
        )
    length = min(len(ids), longest)
    return ids[: len(ids) // length * length].view(-1, length)


def _continued(found: Sensitivity, cache: str | Path) -> Sensitivity:
    kept = Sensitivity.load(cache)
    if kept.model_copy(update={"groups": ()}) != found:
        raise PrecisionError(
            f"{cache}: was measured on another model or text, or in another way; delete it or name another"
        )
    return kept


def _fingerprint(model: nn.Module, ids: Tensor, widths: Sequence[int], modules: Mapping[str, tuple[str, ...]]) -> str:
    digest = blake3(repr((ids.tolist(), widths, list(modules.items()))).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.data.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
