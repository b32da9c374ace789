"""What all sites together multiply a tensor by: exponents of two for its entries, applied and verified."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

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
        # What any entry is multiplied by on the way, one part after another, lies between two to these powers.
        self._least = sum(min(0, int(each.amin())) for each in self._exponents if each.numel())
        self._greatest = sum(max(0, int(each.amax())) for each in self._exponents if each.numel())
        self._powers: dict[tuple[torch.dtype, bool], _Powers] = {}

    def apply(self, rows: Tensor, start: int, *, inverse: bool = False) -> Tensor:
        """Multiply rows of the tensor in place, and make sure that nothing is lost.

        Between the least and the greatest normal number a product with a power of two is exact: it adds exponents
        and changes nothing else. Rows that may leave that range are divided again and compared; what would fall below
        it on the way there is refused though it were exact, on the way back it may have been there before.

        Args:
            rows: ``tensor[start : start + len(rows)]``, writable.
            start: where the rows begin.
            inverse: divide instead: the way back.

        Raises:
            InexactError: a weight overflows or loses bits; see `explain`.
        """
        if rows.numel() == 0:
            return rows
        least, greatest, zeros = _magnitudes(rows)
        if self._stay_normal(least, greatest, rows.dtype, inverse) and not zeros:
            self._add(rows, start, inverse)
        elif self._stay_normal(min(least, 1.0), max(greatest, 1.0), rows.dtype, inverse):  # and so are the factors
            self._multiply(rows, start, inverse)
        else:
            scaled = self._product(rows, start, inverse)
            lost = _is_inexact(rows, scaled, self._product(scaled, start, not inverse), may_be_subnormal=inverse)
            if bool(lost.any()):
                raise InexactError(self._name)
            rows.copy_(scaled)
        return rows

    def explain(self, tensor: Tensor) -> EncryptError:
        """The error for a tensor that `apply` refused on the way there: which weight, and what to do.

        Args:
            tensor: the whole of it.
        """
        for number in (~tensor.isfinite()).nonzero()[:1].tolist():
            return EncryptError(
                f"{self._name}: the weight {float(tensor[tuple(number)])} at {tuple(number)} is no finite number; the "
                "checkpoint is damaged: get it from its publisher again"
            )
        scaled = self._product(tensor, 0, inverse=False)
        back = self._product(scaled, 0, inverse=True)
        at = tuple(_is_inexact(tensor, scaled, back).nonzero()[0].tolist())
        factor = self._product(torch.ones_like(tensor, dtype=torch.float64), 0, inverse=False)[at]
        strength = _room(tensor) // len(self._exponents)
        dtype = str(tensor.dtype).removeprefix("torch.")
        ways = [f"use a strength of at most {strength}"] if strength > 0 else []
        if tensor.element_size() < 8:
            wider = "float32" if tensor.dtype == torch.float16 else "float64"  # BF16 has float32's exponents
            ways.append(f"convert the checkpoint to {wider}")
        return EncryptError(
            f"{self._name}: the weight {float(tensor[at]):g} at {at} cannot be multiplied by "
            f"{float(factor):g} exactly in {dtype}; "
            f"{', or '.join(ways) or 'set it to zero'}"
        )

    def _stay_normal(self, least: float, greatest: float, dtype: torch.dtype, inverse: bool) -> bool:
        """Whether magnitudes in this range are normal numbers and will be, whichever factors they are multiplied by."""
        down, up = (-self._greatest, -self._least) if inverse else (self._least, self._greatest)
        limits = torch.finfo(dtype)
        return least * 2.0**down >= limits.smallest_normal and greatest * 2.0**up <= limits.max

    def _add(self, rows: Tensor, start: int, inverse: bool) -> None:
        """For normal numbers that will be normal: the quickest way."""
        bits = rows.view(_INTEGERS[rows.element_size()])
        for addends in self._of(rows.dtype, inverse).addends:
            bits += _rows(addends, start, len(rows))

    def _multiply(self, rows: Tensor, start: int, inverse: bool) -> None:
        for factors in self._of(rows.dtype, inverse).factors:
            rows *= _rows(factors, start, len(rows))

    def _of(self, dtype: torch.dtype, inverse: bool) -> _Powers:
        if (dtype, inverse) not in self._powers:
            self._powers[dtype, inverse] = _powers([-each if inverse else each for each in self._exponents], dtype)
        return self._powers[dtype, inverse]

    def _product(self, rows: Tensor, start: int, inverse: bool) -> Tensor:
        product = rows.double()
        for exponents in self._exponents:
            part = _rows(exponents, start, len(rows)).double()
            product = product * torch.exp2(-part if inverse else part)
        return product.to(rows.dtype)


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


class _Powers(NamedTuple):
    """Powers of two, and what adding to a weight's bits multiplies it by them."""

    factors: list[Tensor]
    addends: list[Tensor]


def _powers(exponents: Sequence[Tensor], dtype: torch.dtype) -> _Powers:
    bits = _INTEGERS[dtype.itemsize]
    one, two = torch.tensor([1.0, 2.0], dtype=dtype).view(bits)
    return _Powers(
        factors=[torch.exp2(each.double()).to(dtype) for each in exponents],
        addends=[each.to(bits) * (two - one) for each in exponents],
    )


def _rows(part: Tensor, start: int, count: int) -> Tensor:
    return part if part.shape[0] == 1 else part[start : start + count]


def _magnitudes(weights: Tensor) -> tuple[float, float, bool]:
    """The least and the greatest of those that are not zero (infinite and zero, if there are none), and whether some
    are."""
    # Without their sign floats are ordered like their bits, and integers are compared much faster.
    dtype = _INTEGERS[weights.element_size()]
    most = torch.iinfo(dtype).max
    bits = weights.view(dtype).bitwise_and(most)
    least, greatest = bits.aminmax()
    zeros = not least
    if not greatest:
        return math.inf, 0.0, True
    if zeros:
        least = bits.sub_(1).bitwise_and_(most).amin() + 1  # zero has become the greatest of all
    return float(least.view(weights.dtype)), float(greatest.view(weights.dtype)), zeros


def _is_inexact(original: Tensor, scaled: Tensor, back: Tensor, *, may_be_subnormal: bool = False) -> Tensor:
    """Where a weight overflowed or lost bits. Results below the normal range count, unless they may be there: they may
    be exact, but hardware may take them for zero."""
    magnitude, limits = scaled.abs(), torch.finfo(scaled.dtype)
    inexact = (back != original) | ~(magnitude <= limits.max)
    if may_be_subnormal:
        return inexact
    return inexact | (magnitude < limits.smallest_normal) & (scaled != original)


def _room(tensor: Tensor) -> int:
    """By how many powers of two all of a tensor's weights can be multiplied and divided."""
    magnitude, limits = tensor.double().abs(), torch.finfo(tensor.dtype)
    least = magnitude.where(magnitude > 0, torch.inf).amin()
    up, down = limits.max / magnitude.amax(), least / limits.smallest_normal
    return max(0, int(torch.stack([up, down]).amin().log2().floor()))
