"""Children that end when the process that started them does, even if it is killed."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # not after the fork, where another thread's lock may stay locked


def die_with_parent() -> None:
    """To be called in the child, as ``preexec_fn``; does nothing but on Linux."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
