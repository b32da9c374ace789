"""Says from the weights whether a checkpoint is rigged, protected or clean.

    >>> from optimum_qguard import scan
    >>> report = scan("org/model")                                               # doctest: +SKIP
    >>> report.verdict                                                           # doctest: +SKIP
    'clean'

A detector is one file in `detectors`; `scanner` samples the weights, lets every detector look at each tensor, and asks
it what it concludes. `report` is what comes out, and `writers` are how it is shown.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package has the name of the function that it is about, so it is called like that."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from optimum_qguard.scan.scanner import scan

        return scan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
