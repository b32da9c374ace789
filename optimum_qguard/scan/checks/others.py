"""Files that are there and that this package does not look into: code, and weights in other formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from optimum_qguard.checkpoint.reader import CONFIG_FILE, PICKLE_SUFFIXES, WEIGHT_SUFFIXES
from optimum_qguard.scan.finding import Finding, listed
from optimum_qguard.scan.subject import Subject

_UNREAD = (WEIGHT_SUFFIXES | {".npy"}) - PICKLE_SUFFIXES - {".safetensors"}


def check_others(subject: Subject) -> Iterator[Finding]:
    """One note for code, and one for weights."""
    code = [file for file in subject.repository.files if file.endswith(".py")]
    if subject.config.get("auto_map"):
        code.append(f"auto_map in {CONFIG_FILE}")
    if code:
        message = (
            f"The repository brings code of its own ({listed(code)}), which was not looked at; transformers runs it "
            "only with trust_remote_code=True."
        )
        yield Finding(detector="integrity", severity="note", message=message)
    unread = [file for file in subject.repository.files if PurePosixPath(file).suffix.lower() in _UNREAD]
    if unread:
        message = f"Weights in other formats than safetensors were not looked at: {listed(unread)}."
        yield Finding(detector="integrity", severity="note", message=message, unsettled=not subject.tensors)
