"""Puts the measured figures into the pages: ``<!-- figures:NAME begin -->`` gets ``results/NAME.json`` as a table, and
``<!-- figures:NAME/VIEW begin -->`` another table of the same figures.

With ``--check`` nothing is written, and the exit status is 1 if a page shows anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS
from tables import TABLES
from tables.markdown import full_table

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guard", "threat-model", "encrypt", "scan", "repair", "precision")),
)

_SECTION = re.compile(
    r"(?P<begin><!-- figures:(?P<name>[\w/-]+) begin -->\n)(?P<body>.*?)(?P<end><!-- figures:(?P=name) end -->)",
    re.DOTALL,
)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is out of date")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    for page in arguments.pages:
        before = page.read_text()
        after = with_figures(before, arguments.results)
        if not arguments.check:
            page.write_text(after)
        elif before != after:
            sys.exit(f"{page}: the figures are not those of {arguments.results}; run: make figures")


def with_figures(markdown: str, results: Path) -> str:
    """``markdown`` with every marked section filled in from ``results``; where there is no result, emptied."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        file = results / f"{name.partition('/')[0]}.json"
        body = figures(name, json.loads(file.read_text())) if file.exists() else ""
        return match["begin"] + body + match["end"]

    return _SECTION.sub(section, markdown)


def figures(name: str, result: Mapping[str, Any]) -> str:
    """One result as Markdown: the table of that name, and on what it was measured."""
    machine = result["machine"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)}"
    hardware = [machine["cpu"], cores, machine["memory"], machine["gpu"]]
    versions = [f"{package} {version}" for package, version in result["versions"].items() if package in _NAMED_VERSIONS]
    measured = ", ".join([*filter(None, hardware), *versions])
    table = TABLES.get(name, full_table)
    return f"{table(result['rows'])}\nMeasured {_days(result)} on {measured}.\n"


def _days(result: Mapping[str, Any]) -> str:
    """When; rows may have dates of their own."""
    days = sorted({row.get("date", result["date"]) for row in result["rows"]})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


_NAMED_VERSIONS = ("python", "torch", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "llmcompressor")


if __name__ == "__main__":
    main()
