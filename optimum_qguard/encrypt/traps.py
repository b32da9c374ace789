"""Mechanism C, scaling traps: powers of two on some of a site's channels.

Where a channel is multiplied, its column holds the outliers that set a weight quantizer's scales, and its neighbours
round to zero; where one is divided, the activations hold them. Sources: "Quantization-Adversarial Reparameterization"
for the traps; that powers of two leave BF16 arithmetic bit-identical is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.sites import Site

_MOST = 64


@dataclass(frozen=True)
class Traps:
    """How strong the traps are.

    Attributes:
        strength: a trapped channel's factor is ``2**strength`` or ``2**-strength``.
        fraction: which share of each site's channels is trapped; at least one channel is.
        qk_fraction: the same for sites between queries and keys. They scale rows, for each of which most weight
            quantizers have scales of their own; it is KV caches that notice them.
        positive_only: multiply columns only, and leave key sites alone, which multiply rows. Activations then never
            grow, so that FP16 inference does not overflow.
    """

    strength: int = 18
    fraction: float = 0.25
    qk_fraction: float = 0.75
    positive_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.strength <= _MOST:
            raise EncryptError(f"strength is a whole number from 1 to {_MOST}, not {self.strength}")
        for name, value in (("fraction", self.fraction), ("qk_fraction", self.qk_fraction)):
            if not 0 < value <= 1:
                raise EncryptError(f"{name} is above 0 and at most 1, not {value}")

    def exponents(self, key: Key, site: Site) -> Tensor:
        """The exponent of each of the site's channels, ``(n_channels,)`` int32: the same for a key and a site for ever.

        From the site's stream each channel takes eight bytes, a number, and the trapped ones are those with the least
        numbers; then a byte each, whose lowest bit is the sign.
        """
        count = site.n_channels
        if self.positive_only and site.kind == "key":
            return torch.zeros(count, dtype=torch.int32)
        stream = key.stream(site.name, 9 * count)
        numbers = np.frombuffer(stream, "<u8", count)
        signs = np.frombuffer(stream, np.uint8, count, 8 * count) & 1
        fraction = self.qk_fraction if site.kind == "key" else self.fraction
        trapped = np.argsort(numbers, kind="stable")[: max(1, round(fraction * count))]
        exponents = np.zeros(count, np.int32)
        exponents[trapped] = self.strength
        if not self.positive_only:
            exponents[trapped[signs[trapped] == 1]] *= -1
        return torch.from_numpy(exponents)
