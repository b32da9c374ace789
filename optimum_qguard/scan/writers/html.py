"""One page for a browser that needs nothing else: no script, no request, no style from outside."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources

from optimum_qguard import __version__
from optimum_qguard.checkpoint.errors import printable
from optimum_qguard.scan.chart import chart
from optimum_qguard.scan.detectors import detector_names, get_detector
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writer import register

MOST_OPEN = 10
"""Findings that are seen at once; the others are folded away."""


def write(reports: Sequence[ScanReport]) -> str:
    """See `Writer`."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files(__package__)
    style = (files / "page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(printable=printable, number=_number)
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    known = detector_names()
    return (
        template.render(
            reports=reports,
            counts=Counter(report.verdict for report in reports),
            charts=[[chart(plot) for plot in report.plots] for report in reports],
            groups=[_groups(report.findings) for report in reports],
            summaries={name: get_detector(name).summary for name in known},
            style=style,
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            version=__version__,
        ).rstrip()
        + "\n"
    )


def _groups(findings: Sequence[Finding]) -> list[Sequence[Finding]]:
    """Those that are seen at once, and the others if there are any."""
    return [part for part in (findings[:MOST_OPEN], findings[MOST_OPEN:]) if part]


def _number(value: float) -> str:
    return f"{value:.4g}"


register("html", write)
