"""The published JSON Schema is that of the manifest."""

import json
from pathlib import Path

from optimum_qguard.encrypt.manifest import EncryptReport

SCHEMA = Path(__file__).parents[2] / "docs" / "qguard.schema.json"


def test_the_published_schema_is_current() -> None:
    """`EncryptReport.model_json_schema()` as JSON is what is in the file."""
    assert json.loads(SCHEMA.read_text()) == EncryptReport.model_json_schema()
