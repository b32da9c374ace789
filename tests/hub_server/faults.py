"""What can go wrong on the way, by order."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to the next requests whose ``"METHOD path"`` is found by a pattern.

    Attributes:
        pattern: a regular expression.
        times: to how many requests.
        skip: how many requests that match are left alone before.
        status: answered instead of the real answer.
        headers: of the answer, beside or instead of the real ones.
        delay: seconds before the answer.
        drip: seconds after each piece of the body.
        piece: length of such a piece.
        cut_after: how many bytes of the body are sent before the connection is cut; 0: none.
        drop: the connection is cut without an answer.
        ignore_range: 200 and the whole file instead of 206.
        shift_range: the Content-Range header, and the bytes, are this much further on than asked for.
        body: sent in place of the real one, as long as that or not.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    piece: int = 1 << 16
    cut_after: int | None = None
    drop: bool = False
    ignore_range: bool = False
    shift_range: int = 0
    body: bytes | None = None


NO_FAULT = Fault("", 0)


class Faults:
    """Those that are still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def take(self, request: str) -> Fault:
        """What happens to this request; the first order that matches counts."""
        with self._lock:
            for fault in self._waiting:
                if fault.times <= 0 or not re.search(fault.pattern, request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return NO_FAULT
