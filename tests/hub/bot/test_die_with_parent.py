"""No bot is left behind by a test run that is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, subprocess, sys
from die_with_parent import die_with_parent
nowhere = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "60"], stdout=nowhere, stderr=nowhere, preexec_fn=die_with_parent)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_child_of_a_killed_process_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=False
    )
    child = Path(f"/proc/{int(done.stdout)}")
    end = time.monotonic() + 20
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
