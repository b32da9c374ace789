"""Whether the repository is what it says it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from optimum_qguard.scan.checks.ancestry import check_ancestry
from optimum_qguard.scan.checks.claims import check_claims, has_claims
from optimum_qguard.scan.detector import Detector, register
from optimum_qguard.scan.finding import Conclusion
from optimum_qguard.scan.sample import Sample
from optimum_qguard.scan.subject import Subject


@register
class Provenance(Detector):
    """Manifest, card and base model against files and weights. It reads what it needs when it concludes."""

    name: ClassVar[str] = "provenance"
    summary: ClassVar[str] = "qguard.json, the model card and the base model agree with files and weights."

    def examine(self, sample: Sample) -> None:
        return None

    def conclude(self, evidence: Mapping[str, Sequence[Any]], subject: Subject, alpha: float) -> Conclusion:
        if subject.base is None and not has_claims(subject):
            return Conclusion(not_run="it claims nothing: no qguard.json, no tags in its card, and no base was named")
        return Conclusion([*check_claims(subject), *check_ancestry(subject, alpha)])
