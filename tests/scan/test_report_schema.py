"""The published JSON Schema is that of the report."""

import json
from pathlib import Path

from optimum_qguard.scan.report import ScanReport

SCHEMA = Path(__file__).parents[2] / "docs" / "scan.schema.json"


def test_the_published_schema_is_current() -> None:
    """`ScanReport.model_json_schema()` as JSON is what is in the file."""
    assert json.loads(SCHEMA.read_text()) == ScanReport.model_json_schema()
