"""What the scanner finds."""

from __future__ import annotations

from tables.markdown import Rows, markdown


def accuracy_table(rows: Rows) -> str:
    """Specimens down; how many of the quick scans raised the alarm, and what the deep one said."""
    head = ["checkpoint", "is", "quick scans with an alarm", "verdict", "found by", "deep scan", "found by"]
    return markdown(
        head,
        [
            [
                row["specimen"],
                row["kind"],
                f"{row['alarms']} of {row['quick scans']}",
                row["verdict"],
                row["detectors"],
                row["deep verdict"] or "",
                row["deep detectors"] or "",
            ]
            for row in rows
        ],
    )
