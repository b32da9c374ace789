"""Errors in one line."""

from __future__ import annotations

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.formats import WeightError
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.hub.bot.errors import BotError
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.scan.errors import ScanError

_SAY_WHAT_TO_DO = (
    AttackError,
    BotError,
    CheckpointError,
    EncryptError,
    EvaluationError,
    WeightError,
    PrecisionError,
    QGuardConfigError,
    QGuardError,
    RepairError,
    ScanError,
    FileNotFoundError,
    ImportError,
)


def one_line(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    message = printable(" ".join(str(error).split()))  # names in files may hold anything
    if isinstance(error, _SAY_WHAT_TO_DO) and message:
        return message
    return f"{type(error).__name__}: {message or 'no message'} (not foreseen: --debug shows where it happened)"
