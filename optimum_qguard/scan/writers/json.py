"""JSON: the report of one repository as it is, several as ``{"reports": […]}``. Schema: docs/scan.schema.json."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_qguard.scan.escape import json_document
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writer import register


def write(reports: Sequence[ScanReport]) -> str:
    """See `Writer`."""
    documents = [report.model_dump(mode="json") for report in reports]
    content = documents[0] if len(documents) == 1 else {"reports": documents}
    return json_document(content)


register("json", write)
