"""optimum-qguard: what quantization does to a model's behaviour when somebody plans for it.

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from optimum_qguard import QGuardConfig

    model = AutoModelForCausalLM.from_pretrained(
        "org/model", quantization_config=QGuardConfig(BitsAndBytesConfig(load_in_8bit=True))
    )
    model.qguard_report

Importing the package registers ``quant_method="qguard"`` with transformers, and imports
nothing heavy before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from optimum_qguard import _plugin

if TYPE_CHECKING:
    from optimum_qguard.encrypt.conditioning import Conditioning as Conditioning
    from optimum_qguard.encrypt.errors import EncryptError as EncryptError
    from optimum_qguard.encrypt.key import Key as Key
    from optimum_qguard.encrypt.manifest import EncryptReport as EncryptReport
    from optimum_qguard.encrypt.residue import Residue as Residue
    from optimum_qguard.encrypt.transform import decrypt_checkpoint as decrypt_checkpoint
    from optimum_qguard.encrypt.transform import encrypt_checkpoint as encrypt_checkpoint
    from optimum_qguard.encrypt.traps import Traps as Traps
    from optimum_qguard.encrypt.unlock import QGuardUnlockConfig as QGuardUnlockConfig
    from optimum_qguard.guard.config import QGuardConfig as QGuardConfig
    from optimum_qguard.guard.config import QGuardGPTQConfig as QGuardGPTQConfig
    from optimum_qguard.guard.config import QGuardInt8Config as QGuardInt8Config
    from optimum_qguard.guard.config import QGuardNF4Config as QGuardNF4Config
    from optimum_qguard.guard.errors import QGuardError as QGuardError
    from optimum_qguard.guard.guard_all import guard_all as guard_all
    from optimum_qguard.guard.report import GuardReport as GuardReport
    from optimum_qguard.precision.bitmap import BitMap as BitMap
    from optimum_qguard.precision.config import PrecisionConfig as PrecisionConfig
    from optimum_qguard.precision.errors import PrecisionError as PrecisionError
    from optimum_qguard.repair.anchor import AnchorCallback as AnchorCallback
    from optimum_qguard.repair.report import RepairReport as RepairReport
    from optimum_qguard.repair.run import repair_checkpoint as repair_checkpoint
    from optimum_qguard.repair.trainer import AnchorTrainer as AnchorTrainer
    from optimum_qguard.scan.report import ScanReport as ScanReport
    from optimum_qguard.scan.scanner import scan as scan

__version__ = "0.1.0"

_WHERE = {
    "AnchorCallback": "repair.anchor",
    "AnchorTrainer": "repair.trainer",
    "BitMap": "precision.bitmap",
    "Conditioning": "encrypt.conditioning",
    "EncryptError": "encrypt.errors",
    "EncryptReport": "encrypt.manifest",
    "GuardReport": "guard.report",
    "Key": "encrypt.key",
    "PrecisionConfig": "precision.config",
    "PrecisionError": "precision.errors",
    "QGuardConfig": "guard.config",
    "QGuardError": "guard.errors",
    "QGuardGPTQConfig": "guard.config",
    "QGuardInt8Config": "guard.config",
    "QGuardNF4Config": "guard.config",
    "QGuardUnlockConfig": "encrypt.unlock",
    "RepairReport": "repair.report",
    "Residue": "encrypt.residue",
    "ScanReport": "scan.report",
    "Traps": "encrypt.traps",
    "decrypt_checkpoint": "encrypt.transform",
    "encrypt_checkpoint": "encrypt.transform",
    "guard_all": "guard.guard_all",
    "repair_checkpoint": "repair.run",
}

__all__ = [*_WHERE, "__version__", "scan"]


def __getattr__(name: str) -> Any:
    if name == "scan":
        return importlib.import_module(f"{__name__}.scan")
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_plugin.install()
