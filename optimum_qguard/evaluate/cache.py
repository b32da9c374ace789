"""Models that are made once and kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """``$OPTIMUM_QGUARD_CACHE``, or ``~/.cache/optimum-qguard``."""
    return Path(os.environ.get("OPTIMUM_QGUARD_CACHE") or "~/.cache/optimum-qguard").expanduser()


def made_once(final: Path, make: Callable[[Path], None]) -> Path:
    """``final``, made by ``make(folder)`` in a temporary folder beside it unless it is there already.

    Where several processes ask at once, one makes it and the others wait; after an error nothing is left.
    """
    if final.is_dir():
        return final
    from filelock import FileLock

    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f".{final.name}.lock")):
        if not final.is_dir():
            # The lock's holder is the only builder, so what lies here was left by a run that was killed.
            partial = final.with_name(f".{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                make(partial)
                partial.rename(final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return final
