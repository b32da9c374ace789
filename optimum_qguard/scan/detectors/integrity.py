"""Whether the files are what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from optimum_qguard.scan.checks.configuration import check_configuration
from optimum_qguard.scan.checks.numbers import Extent, check_numbers, extent
from optimum_qguard.scan.checks.others import check_others
from optimum_qguard.scan.checks.pickles import check_pickles
from optimum_qguard.scan.checks.shards import check_shards
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.finding import Conclusion, Finding
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject


@register
class Integrity(Detector):
    """Files that do not add up or may run code, and weights that are no numbers."""

    name: ClassVar[str] = "integrity"
    summary: ClassVar[str] = "Files are complete, consistent and without dangerous pickles, and weights are finite."

    def examine(self, sample: Sample) -> Extent:
        return extent(sample.rows)

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        found = [
            Finding(detector=self.name, severity="error", file=file, message=problem)
            for file, problem in subject.problems.items()
        ]
        found += check_shards(subject)
        found += check_numbers(evidence, subject)
        found += check_configuration(subject)
        found += check_pickles(subject)
        found += check_others(subject)
        return Conclusion(found)
