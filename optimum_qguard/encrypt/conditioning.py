"""Mechanism A, keyed ill-conditioning: values are read in coordinates of very different scale.

For each key-value head ``S = Q diag(lambda) Q^T`` with an orthogonal ``Q`` that the key draws (`orthogonal`) and
``lambda`` spaced evenly in its logarithm, the largest ``kappa`` times the least and the geometric mean 1; its inverse
is ``Q diag(1 / lambda) Q^T``. Rounding errors of a quantizer are amplified by up to ``kappa``, and no scaling of single
channels undoes it. Source: "Quantization-Adversarial Reparameterization", whose next consumer across a norm is not
invariant; between values and the output projection it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimum_qguard.encrypt.drawing import orthogonal, uniforms
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.mixing import Blocks
from optimum_qguard.encrypt.sites import Site, in_band

_MOST = 2.0**20


@dataclass(frozen=True)
class Conditioning:
    """How ill-conditioned. The defaults are the paper's.

    Attributes:
        kappa_min, kappa_max: each layer's condition number is drawn evenly between them; 1 and 1 is no conditioning.
        plain_layers: how many layers of the band are left alone, at most half of them.
        spacing: those are at least so many layers apart, so there may be fewer.
        first_layer, last_layer: the band, both included, counted from 0; without a last one, up to the end.
    """

    kappa_min: float = 28.0
    kappa_max: float = 32.0
    plain_layers: int = 4
    spacing: int = 3
    first_layer: int = 0
    last_layer: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.kappa_min <= self.kappa_max <= _MOST:
            raise EncryptError(
                f"kappa is from 1 to {_MOST:.0f}, the least first, not {self.kappa_min:g} to {self.kappa_max:g}"
            )
        if self.plain_layers < 0 or self.spacing < 1:
            raise EncryptError(
                f"plain_layers is at least 0 and their spacing at least 1, not {self.plain_layers} and {self.spacing}"
            )

    def kappas(self, key: Key, sites: Sequence[Site]) -> Mapping[str, float]:
        """The condition number of each value site that is conditioned, by its name.

        Each site of the band draws two numbers. Plain layers are taken in the order of the first, passing over those
        that are too near to one that was taken; the second is the condition number, from the least to the largest.
        """
        band = in_band(sites, self.first_layer, self.last_layer)
        drawn = {layer: uniforms(key, f"{site.name}.conditioning", 2) for layer, site in band.items()}
        plain: list[int] = []
        for layer in sorted(band, key=lambda layer: float(drawn[layer][0])):
            near = any(abs(layer - other) < self.spacing for other in plain)
            if len(plain) < min(self.plain_layers, len(band) // 2) and not near:
                plain.append(layer)
        width = self.kappa_max - self.kappa_min
        kappas = {
            site.name: self.kappa_min + width * float(drawn[layer][1])
            for layer, site in band.items()
            if layer not in plain
        }
        return {name: kappa for name, kappa in kappas.items() if kappa > 1}

    def blocks(self, key: Key, sites: Sequence[Site]) -> Mapping[str, Blocks]:
        """The matrices of each site that is conditioned, by its name."""
        kappas = self.kappas(key, sites)
        return {site.name: _blocks(key, site, kappas[site.name]) for site in sites if site.name in kappas}


def spectrum(kappa: float, size: int) -> Tensor:
    """``lambda``, ``(size,)`` float64, from the largest to the least."""
    return torch.from_numpy(kappa ** (0.5 - np.arange(size) / max(size - 1, 1)))


def _blocks(key: Key, site: Site, kappa: float) -> Blocks:
    def blocks(block: int) -> tuple[Tensor, Tensor]:
        q = orthogonal(key, f"{site.name}.conditioning.{block}", site.block)
        scales = spectrum(kappa, site.block)
        return (q * scales) @ q.T, (q / scales) @ q.T

    return blocks
