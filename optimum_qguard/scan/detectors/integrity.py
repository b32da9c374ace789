"""Whether the files are what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.finding import Conclusion, Finding
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject


@register
class Integrity(Detector):
    """Headers that do not add up, and weights that are no numbers."""

    name: ClassVar[str] = "integrity"
    summary: ClassVar[str] = "Files are complete and consistent, and weights are finite numbers."

    def examine(self, sample: Sample) -> int:
        """How many weights are NaN or infinite."""
        return int((~torch.isfinite(sample.rows)).sum())

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        found = [
            Finding(detector=self.name, severity="error", file=file, message=problem)
            for file, problem in subject.problems.items()
        ]
        for tensor, counts in evidence.items():
            if sum(counts):
                message = f"{sum(counts)} of the weights of {tensor} are NaN or infinite."
                found.append(Finding(detector=self.name, severity="error", tensor=tensor, message=message))
        return Conclusion(found)
