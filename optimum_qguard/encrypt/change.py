"""What encryption does to one tensor, all mechanisms together, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.mixing import Mixing, mixings
from optimum_qguard.encrypt.residue import Residue
from optimum_qguard.encrypt.scaling import Scaling, scalings
from optimum_qguard.encrypt.sites import Site
from optimum_qguard.encrypt.traps import Traps


@dataclass(frozen=True)
class Change:
    """Mixing in float64 with one rounding, then powers of two, which round nothing.

    Attributes:
        scaling: mechanism C.
        mixing: mechanisms A and B. With it the whole tensor is needed at once, and the way back gives it up to
            rounding; without it, bit for bit.
    """

    scaling: Scaling | None = None
    mixing: Mixing | None = None

    @property
    def mixes(self) -> bool:
        return self.mixing is not None

    def apply(self, rows: Tensor, start: int, *, inverse: bool = False) -> Tensor:
        """The changed rows; they may be changed in place.

        Args:
            rows: ``tensor[start : start + len(rows)]``, writable; the whole of it, if it is mixed.
            start: where the rows begin.
            inverse: the way back.

        Raises:
            InexactError: a weight overflows or loses bits when it is scaled; see `explain`.
            EncryptError: a weight overflows when it is mixed.
        """
        if self.mixing is not None and not inverse:
            rows = self.mixing.apply(rows)
        if self.scaling is not None:
            self.scaling.apply(rows, start, inverse=inverse)
        if self.mixing is not None and inverse:
            rows = self.mixing.apply(rows, inverse=True)
        return rows

    def explain(self, tensor: Tensor) -> EncryptError:
        """The error for a tensor that was refused with `InexactError` on the way there."""
        assert self.scaling is not None
        return self.scaling.explain(tensor if self.mixing is None else self.mixing.apply(tensor))


def changes(
    sites: Sequence[Site],
    key: Key,
    *,
    traps: Traps | None = None,
    conditioning: Conditioning | None = None,
    residue: Residue | None = None,
) -> Mapping[str, Change]:
    """What each tensor is changed by, by its name; tensors that stay as they are are left out.

    Args:
        sites: of the whole model.
        key: which everything is drawn from.
        traps, conditioning, residue: mechanisms C, A and B; without one, it is not applied.
    """
    scaled = {} if traps is None else scalings(sites, lambda site: traps.exponents(key, site))
    mechanisms = [mechanism.blocks(key, sites) for mechanism in (conditioning, residue) if mechanism is not None]
    mixed = mixings(sites, mechanisms)
    return {name: Change(scaled.get(name), mixed.get(name)) for name in {**scaled, **mixed}}
