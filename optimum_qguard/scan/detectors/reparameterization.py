"""Channels that are scaled up where they are read and down where they are computed, which full precision does not show.

For a channel let ``d`` be half of the octaves by which the weights that read it are larger, and those that compute it
smaller, than those of the median channel, and ``s`` the octaves by which their product is. Scaling a channel moves
``d`` and leaves ``s``. So a channel is *unbalanced* from ``x`` octaves on if ``|d| >= x`` and ``|s| <= |d| / 2``. Of
trained models few channels are beyond one octave (see docs/scan-methods.md); their share is taken to be at most
``2**-(2 x + 6)``, so that their number is at most a binomial. Channels of the residual stream that are large all
through a model count once, and a few of them are allowed for on top.

Encrypted checkpoints of this package are unbalanced. If one says so itself, and the factors are those that it says,
that is a note; whatever else is found is a warning, as nothing but a quantizer would notice it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from optimum_qguard.scan.channels import Channels, Octaves, measure, median
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.finding import Conclusion, Finding, Severity
from optimum_qguard.scan.protected import claims_protection
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.sites import SiteSizes, find_sites
from optimum_qguard.scan.subject import Subject
from optimum_qguard.scan.tails import binomial_tail

_FEW = {3.0: 8, 4.0: 8, 6.0: 4, 9.0: 1}  # by octaves, how many channels any model may have
_NAMES = {
    "norm": "norms against the linears that read them",
    "value": "attention values against the output projection",
    "up": "the MLP's first projection against its second",
    "key": "queries against keys",
}
_ALIKE = 0.75  # octaves from the median, of factors that are the same
_MOST = 0.8
_EXACT = 0.1
_STRONGEST = 64  # octaves, that any encryption has


@register
class Reparameterization(Detector):
    """See the module."""

    name: ClassVar[str] = "reparameterization"
    summary: ClassVar[str] = "What computes a channel and what reads it are as large as in a trained model."

    def examine(self, sample: Sample) -> Channels | None:
        return self.examine_many([sample])[0]

    def examine_many(self, samples: Sequence[Sample]) -> Sequence[Channels | None]:
        found: dict[int, Channels] = {}
        alike: dict[object, list[int]] = defaultdict(list)
        for number, sample in enumerate(samples):
            if sample.rows.is_floating_point():
                alike[sample.rows.dtype, sample.rows.shape].append(number)
        for numbers in alike.values():
            found.update(zip(numbers, measure([samples[number] for number in numbers]), strict=True))
        return [found.get(number) for number in range(len(samples))]

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        kinds = _by_kind(find_sites(evidence, subject.config))
        tests = len(_NAMES) * len(_FEW)
        found = {}
        for kind, channels in kinds.items():
            p_value, least = min((channels.p_value(least), -least) for least in _FEW)
            if p_value * tests <= alpha:
                found[kind] = p_value, -least
        if not found:
            return Conclusion()
        kind = min(found, key=lambda each: found[each])
        p_value, least = found[kind]
        factors = np.concatenate([kinds[each].factors() for each in found])
        severity, message = _judge(factors, found, subject)
        worst = kinds[kind]
        finding = Finding(
            detector=self.name,
            severity=severity,
            message=message,
            tensor=worst.producer,
            statistic=f"share of channels {least:.0f} octaves out of balance: {_NAMES[kind]}",
            value=worst.beyond(least) / worst.total,
            expected=_share(least),
            p_value=p_value,
        )
        return Conclusion([finding])


def _judge(factors: Octaves, kinds: Iterable[str], subject: Subject) -> tuple[Severity, str]:
    seen = (
        "Channels are scaled one way where they are computed, and the other way where they are read, by {} "
        f"({'; '.join(_NAMES[kind] for kind in kinds)})"
    )
    claimed = _claimed_strength(subject)
    if claimed is not None and _are_all(factors, claimed):
        seen = seen.format(f"2**{claimed}")
        return "note", f"{seen}: the checkpoint is encrypted, as its qguard.json says, and breaks when quantized."
    common = float(np.median(factors))
    alike = factors[np.abs(factors - common) <= _ALIKE]
    same = len(alike) >= _MOST * len(factors)
    common = float(alike.mean()) if same else common
    exact = same and abs(common - round(common)) <= _EXACT
    by = f"2**{round(common)}" if exact else f"about {2**common:.3g}" if same else f"up to {2 ** factors.max():.3g}"
    seen = seen.format(by)
    if claims_protection(subject):
        return "warning", f"{seen}, which is not what its qguard.json says; it breaks when quantized."
    return "warning", f"{seen}: it looks encrypted or sabotaged, the same at full precision but broken when quantized."


def _claimed_strength(subject: Subject) -> int | None:
    """In octaves, of a checkpoint that says that it is encrypted."""
    traps = subject.manifest.get("traps")
    strength = traps.get("strength") if claims_protection(subject) and isinstance(traps, dict) else None
    return strength if isinstance(strength, int) and 0 < strength <= _STRONGEST else None


def _are_all(factors: Octaves, strength: int) -> bool:
    """Whether they are of that strength, or twice that: where most of a site's channels are scaled the median one is,
    and those that are scaled the other way are as far again from it."""
    off = factors - strength * np.where(factors > 1.5 * strength, 2, 1)
    alike = off[np.abs(off) <= _ALIKE]
    return len(alike) >= _MOST * len(factors) and abs(float(alike.mean())) <= _EXACT


@dataclass
class _Unbalanced:
    """All channels of one kind of site.

    Attributes:
        total: how many were looked at.
        channel, octaves: which ones are unbalanced from the least of `_FEW` on, and ``|d|``, site by site.
        producer: of the site that has most of them.
    """

    total: int = 0
    channel: list[NDArray[np.int64]] = field(default_factory=list)
    octaves: list[Octaves] = field(default_factory=list)
    producer: str | None = None
    most: int = 0
    shared: bool = False

    def add(self, site: SiteSizes, unbalanced: tuple[NDArray[np.int64], Octaves, int]) -> None:
        channel, octaves, total = unbalanced
        self.shared |= site.kind == "norm"
        self.total += total
        self.channel.append(channel)
        self.octaves.append(octaves)
        if len(channel) > self.most:
            self.producer, self.most = site.producer, len(channel)

    def factors(self) -> Octaves:
        """How far each one is out of balance."""
        return np.concatenate(self.octaves)

    def beyond(self, least: float) -> int:
        """How many channels; of the residual stream, how many different ones."""
        chosen = [channel[octaves >= least] for channel, octaves in zip(self.channel, self.octaves, strict=True)]
        return len(np.unique(np.concatenate(chosen))) if self.shared else sum(map(len, chosen))

    def p_value(self, least: float) -> float:
        return binomial_tail(self.beyond(least) - _FEW[least], self.total, _share(least))


def _by_kind(sites: Iterable[SiteSizes]) -> dict[str, _Unbalanced]:
    # What reads a norm is not known for sure: of all that may, that counts which is out of balance most.
    best: dict[tuple[str, str], tuple[SiteSizes, tuple[NDArray[np.int64], Octaves, int]]] = {}
    for site in sites:
        key, unbalanced = (site.kind, site.producer), _unbalanced(site)
        if key not in best or len(unbalanced[0]) > len(best[key][1][0]):
            best[key] = site, unbalanced
    kinds: dict[str, _Unbalanced] = defaultdict(_Unbalanced)
    for site, unbalanced in best.values():
        kinds[site.kind].add(site, unbalanced)
    return {kind: channels for kind, channels in kinds.items() if channels.total}


def _unbalanced(site: SiteSizes) -> tuple[NDArray[np.int64], Octaves, int]:
    """Channels that are, by how much, and of how many that are known."""
    known = (np.isfinite(site.computed) & np.isfinite(site.read)).nonzero()[0]
    if len(known) == 0:
        return known, np.zeros(0, np.float32), 0
    computed, read = site.computed[known], site.read[known]
    difference, product = read - computed, read + computed
    octaves = np.abs(difference - np.float32(median(difference))) / 2
    chosen = (octaves >= min(_FEW)) & (np.abs(product - np.float32(median(product))) <= octaves / 2)
    return known[chosen], octaves[chosen], len(known)


def _share(octaves: float) -> float:
    """Of trained models' channels, that are so far out of balance at most."""
    return float(2 ** -(2 * octaves + 6))
