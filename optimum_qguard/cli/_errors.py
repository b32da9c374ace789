"""Errors in one line."""

from __future__ import annotations

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.formats import WeightError
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.scan.errors import ScanError

_SAY_WHAT_TO_DO = (
    AttackError,
    CheckpointError,
    EncryptError,
    EvaluationError,
    WeightError,
    QGuardConfigError,
    QGuardError,
    ScanError,
    FileNotFoundError,
    ImportError,
)
_LONGEST = 1500


def one_line(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    words = " ".join(str(error).split())
    message = "".join(letter if letter.isprintable() else "?" for letter in words)  # names in files may hold anything
    if isinstance(error, _SAY_WHAT_TO_DO) and message:
        return message
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} …"
    return f"{type(error).__name__}: {message or 'no message'} (not foreseen: --debug shows where it happened)"
