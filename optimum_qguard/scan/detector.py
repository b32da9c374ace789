"""What a detector is, and the register of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from optimum_qguard.registry import Registry
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.finding import Conclusion
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject

ALPHA = 1e-3
"""How often all detectors together may raise a false alarm in a scan of a clean repository."""


class Detector(ABC):
    """Looks for one kind of thing.

    `examine` is called for every piece of every tensor, perhaps in another process, and must not keep anything;
    `conclude` is called once with all that it returned.

    Attributes:
        name: as the register calls it.
        summary: what it looks for, in one sentence.
        deep: whether it runs the model, and so only takes part in a deep scan.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    deep: ClassVar[bool] = False

    def examine(self, sample: Sample) -> Any:
        """Evidence from one piece of a tensor: small, and picklable; ``None`` if it does not look at such tensors.

        Raises:
            WeightError: weights that it cannot look at (NaN, infinite).
        """

    def examine_many(self, samples: Sequence[Sample]) -> Sequence[Any]:
        """`examine` of each of them, for detectors that are faster so."""
        return [self.examine(sample) for sample in samples]

    @abstractmethod
    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        """What it all means.

        Args:
            evidence: of the tensors that it looked at, by `Sample.tensor`: one entry for each piece.
            subject: what is scanned.
            alpha: how often this detector may raise a false alarm in a scan, all its tests together.
        """


_REGISTRY: Registry[Callable[[], Detector]] = Registry("detector", "optimum_qguard.scan.detectors", ScanError)


def register(detector: type[Detector]) -> type[Detector]:
    """Class decorator: makes a detector known by its name."""
    _REGISTRY.add(detector.name, detector)
    return detector
