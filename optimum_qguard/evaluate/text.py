"""Real English technical prose without a download: the documentation of Python's own standard library."""

from __future__ import annotations

import importlib
import pydoc
import re
from typing import Literal

Split = Literal["evaluation", "training"]

_MODULES: dict[str, tuple[str, ...]] = {
    "evaluation": (
        "difflib",
        "random",
        "textwrap",
        "threading",
        "datetime",
        "collections",
        "urllib.parse",
        "tempfile",
        "doctest",
        "heapq",
        "fractions",
        "json",
        "csv",
        "subprocess",
        "http.client",
        "ipaddress",
        "email.message",
    ),
    "training": (
        "argparse",
        "statistics",
        "shutil",
        "contextlib",
        "calendar",
        "optparse",
        "configparser",
        "decimal",
        "unittest",
        "zipfile",
        "smtplib",
        "tarfile",
        "weakref",
        "inspect",
        "traceback",
    ),
}

# What depends on the machine (paths, object addresses) or is not prose (constants).
_SECTION = re.compile(r"^(?:FILE|DATA|VERSION|MODULE REFERENCE)\n(?:(?: .*)?\n)*", re.MULTILINE)
_MARGIN = re.compile(r"^ *\| {0,2}", re.MULTILINE)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


def standard_library_text(n_characters: int, split: Split = "evaluation") -> str:
    """The first ``n_characters`` of ``pydoc``'s text over a fixed list of standard modules.

    The same for every call with one Python version. The modules of the two splits are disjoint, so a model trained on
    ``"training"`` can be evaluated on ``"evaluation"``.

    Raises:
        ValueError: more characters asked for than the modules have.
    """
    parts: list[str] = []
    length = 0
    for name in _MODULES[split]:
        if length >= n_characters:
            break
        part = _document(name)
        parts.append(part)
        length += len(part)
    if length < n_characters:
        raise ValueError(f"the {split} text has {length} characters, fewer than the {n_characters} asked for")
    return "".join(parts)[:n_characters]


def _document(name: str) -> str:
    text = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
    text = _MARGIN.sub("", _SECTION.sub("", text))
    return _ADDRESS.sub("0x0", text).strip() + "\n\n"
