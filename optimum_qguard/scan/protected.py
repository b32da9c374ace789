"""What the repository says of itself. That does not make it true, but it makes what is seen no surprise."""

from __future__ import annotations

from optimum_qguard.checkpoint.protection import PROTECTED
from optimum_qguard.scan.subject import Subject


def claims_protection(subject: Subject) -> bool:
    """Whether it says that it was encrypted, so that quantizing breaks it."""
    return subject.manifest.get("kind") == PROTECTED
