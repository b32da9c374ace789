"""Has picklescan look at the pickle on standard input, in a process of its own: a pickle can be made to take all memory
and time of whoever parses it. Run as a script; prints JSON. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys

MEMORY = 1 << 30
SECONDS = 60
_MOST = 100  # more than are known to be harmless


class _Failures(logging.Handler):
    """picklescan only logs that it could not read a file, or a part of one."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "Trying to scan as non-PyTorch file" not in record.msg


def main() -> None:
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(ValueError, OSError):  # a lower one is set already, or macOS
            resource.setrlimit(limit, (value, value))
    from picklescan.scanner import SafetyLevel, scan_bytes

    failures = _Failures(logging.WARNING)
    logging.getLogger("picklescan").addHandler(failures)
    result = scan_bytes(sys.stdin.buffer, "file", sys.argv[1])
    found = {
        level.value: sorted({f"{one.module}.{one.name}"[:100] for one in result.globals if one.safety is level})[:_MOST]
        for level in (SafetyLevel.Dangerous, SafetyLevel.Suspicious)
    }
    json.dump({**found, "complete": not failures.count and result.scanned_files > 0}, sys.stdout)


if __name__ == "__main__":
    main()
