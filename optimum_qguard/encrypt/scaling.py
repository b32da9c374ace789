"""What all sites together multiply a tensor by: exponents of two for its entries, applied and verified."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.sites import Site


class Scaling:
    """The exponents of one tensor: what its parts in several sites add up to.

    Args:
        name: the tensor's name, for errors.
        exponents: one int32 tensor for each part, of the tensor's number of dimensions and broadcastable to its shape.
    """

    def __init__(self, name: str, exponents: Iterable[Tensor]) -> None:
        self._name = name
        # Parts that run over the same dimensions are one multiplication.
        by_shape: dict[torch.Size, Tensor] = {}
        for part in exponents:
            by_shape[part.shape] = by_shape[part.shape] + part if part.shape in by_shape else part
        self._exponents = list(by_shape.values())
        self._factors: dict[tuple[torch.dtype, bool], list[Tensor]] = {}

    def apply(self, rows: Tensor, start: int, *, inverse: bool = False) -> Tensor:
        """Multiply rows of the tensor in place, and make sure that dividing gives them back.

        Args:
            rows: ``tensor[start : start + len(rows)]``, writable.
            start: where the rows begin.
            inverse: divide instead: the way back.

        Raises:
            InexactError: a weight overflows or loses bits; see `explain`.
        """
        original = rows.clone()
        self._multiply(rows, start, inverse)
        back = self._multiply(rows.clone(), start, not inverse)
        # An infinite weight would have come back as another one, and zero as zero.
        if not (_equal_bits(original, back) and _has_no_subnormal(rows)) and bool(
            _is_inexact(original, rows, back).any()
        ):
            raise InexactError(self._name)
        return rows

    def explain(self, tensor: Tensor) -> EncryptError:
        """The error for a tensor that `apply` refused on the way there: which weight, and what to do.

        Args:
            tensor: the whole of it.
        """
        scaled = self._multiply(tensor.clone(), 0, inverse=False)
        back = self._multiply(scaled.clone(), 0, inverse=True)
        at = tuple(_is_inexact(tensor, scaled, back).nonzero()[0].tolist())
        strength = _room(tensor) // len(self._exponents)
        dtype = str(tensor.dtype).removeprefix("torch.")
        way_out = f"use a strength of at most {strength}, or " if strength > 0 else ""
        return EncryptError(
            f"{self._name}: the weight {float(tensor[at]):g} at {at} cannot be multiplied by "
            f"{float(scaled[at].double() / tensor[at].double()):g} exactly in {dtype}; "
            f"{way_out}convert the checkpoint to float32"
        )

    def _multiply(self, rows: Tensor, start: int, inverse: bool) -> Tensor:
        for factors in self._of(rows.dtype, inverse):
            rows *= factors if factors.shape[0] == 1 else factors[start : start + len(rows)]
        return rows

    def _of(self, dtype: torch.dtype, inverse: bool) -> list[Tensor]:
        if (dtype, inverse) not in self._factors:
            sign = -1.0 if inverse else 1.0
            self._factors[dtype, inverse] = [torch.exp2(sign * each.double()).to(dtype) for each in self._exponents]
        return self._factors[dtype, inverse]


class InexactError(ArithmeticError):
    """A weight that cannot be multiplied without losing bits."""


def scalings(sites: Iterable[Site], exponents: Callable[[Site], Tensor]) -> Mapping[str, Scaling]:
    """What each tensor is multiplied by, by its name; tensors that no site touches are left out.

    Args:
        sites: of the whole model.
        exponents: of a site's channels, ``(n_channels,)``, whole numbers.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for site in sites:
        # The last one stands for channel -1, what the site leaves alone.
        padded = torch.cat([exponents(site).int(), torch.zeros(1, dtype=torch.int32)])
        for part in site.parts:
            found[part.tensor].append(padded[part.channels] * (-1 if part.divided else 1))
    return {name: Scaling(name, parts) for name, parts in found.items()}


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    """What a comparison of the floats would say in ten times as long."""
    same_size = _INTEGERS[one.element_size()]
    widest = torch.int64 if one.numel() * one.element_size() % 8 == 0 else same_size
    one, other = (each.contiguous().flatten().view(same_size) for each in (one, other))
    return torch.equal(one.view(widest), other.view(widest))


def _has_no_subnormal(weights: Tensor) -> bool:
    if weights.numel() == 0:
        return True
    dtype = _INTEGERS[weights.element_size()]
    least = torch.tensor(torch.finfo(weights.dtype).smallest_normal, dtype=weights.dtype, device="cpu").view(dtype)
    # Without their sign floats are ordered like their bits; zero becomes the greatest of all.
    unsigned = torch.iinfo(dtype).max
    bits = weights.view(dtype).bitwise_and(unsigned).sub_(1).bitwise_and_(unsigned)
    return int(bits.amin()) >= int(least) - 1


def _is_inexact(original: Tensor, scaled: Tensor, back: Tensor) -> Tensor:
    """Where a weight overflowed or lost bits. Results below the normal range count: they may be exact, but hardware may
    take them for zero."""
    magnitude, limits = scaled.abs(), torch.finfo(scaled.dtype)
    underflow = (magnitude < limits.smallest_normal) & (scaled != original)
    return (back != original) | ~(magnitude <= limits.max) | underflow


def _room(tensor: Tensor) -> int:
    """By how many powers of two all of a tensor's weights can be multiplied and divided."""
    magnitude, limits = tensor.double().abs(), torch.finfo(tensor.dtype)
    least = magnitude.where(magnitude > 0, torch.inf).amin()
    up, down = limits.max / magnitude.amax(), least / limits.smallest_normal
    return max(0, int(torch.stack([up, down]).amin().log2().floor()))
