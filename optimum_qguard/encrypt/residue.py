"""Mechanism B, fragile residue: a low-rank term in the output projection that one in the value projection cancels.

The paper's pair ``W + eps U V^T``, ``W' - eps U V^T`` cancels nowhere in a plain transformer. Its exact form is a shear
of each key-value head's channels: with orthonormal ``a_1 ... a_r, b_1 ... b_r``

    ``(I + eps sum a_i b_i^T)^-1 = I - eps sum a_i b_i^T``

since ``b_i^T a_j = 0``, so that ``W_o <- W_o + eps (W_o a) b^T`` and ``W_v <- W_v - eps a (b^T W_v)`` are that same
pair. Source: "Quantization-Adversarial Reparameterization" for the idea and the values; the shear is ours.
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
class Residue:
    """How much residue. The defaults are the paper's.

    Attributes:
        epsilon_min, epsilon_max: each layer's epsilon is drawn evenly between them.
        rank: pairs of directions in each key-value head; 0 is no residue.
        every: of the band's layers every so many have it, beginning with the first.
        first_layer, last_layer: the band, both included, counted from 0; without a last one, up to the end.
    """

    epsilon_min: float = 6e-3
    epsilon_max: float = 1e-2
    rank: int = 2
    every: int = 3
    first_layer: int = 0
    last_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon_min <= self.epsilon_max <= _MOST:
            raise EncryptError(
                f"epsilon is from 0 to {_MOST:.0f}, the least first, not {self.epsilon_min:g} to {self.epsilon_max:g}"
            )
        if self.rank < 0 or self.every < 1:
            raise EncryptError(f"rank is at least 0 and every at least 1, not {self.rank} and {self.every}")

    def epsilons(self, key: Key, sites: Sequence[Site]) -> Mapping[str, float]:
        """Epsilon of each value site that has a residue, by its name."""
        band = in_band(sites, self.first_layer, self.last_layer)
        if self.rank == 0:
            return {}
        chosen = list(band.values())[:: self.every]
        width = self.epsilon_max - self.epsilon_min
        return {
            site.name: self.epsilon_min + width * float(uniforms(key, f"{site.name}.residue", 1)[0]) for site in chosen
        }

    def blocks(self, key: Key, sites: Sequence[Site]) -> Mapping[str, Blocks]:
        """The matrices of each site that has a residue, by its name.

        Raises:
            EncryptError: a head has too few dimensions for so many pairs.
        """
        epsilons = self.epsilons(key, sites)
        chosen = [site for site in sites if site.name in epsilons]
        for site in chosen:
            if 2 * self.rank > site.block:
                raise EncryptError(
                    f"rank is at most {site.block // 2}, half the {site.block} dimensions of a head, not {self.rank}"
                )
        return {site.name: _blocks(key, site, epsilons[site.name], self.rank) for site in chosen}


def _blocks(key: Key, site: Site, epsilon: float, rank: int) -> Blocks:
    def blocks(block: int) -> tuple[Tensor, Tensor]:
        q = orthogonal(key, f"{site.name}.residue.{block}", site.block)
        identity = torch.from_numpy(np.eye(site.block))
        term = epsilon * q[:, :rank] @ q[:, rank : 2 * rank].T
        return identity + term, identity - term

    return blocks
