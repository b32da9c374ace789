"""What quantizers make of protected models."""

from __future__ import annotations

from tables.markdown import Rows, markdown, text


def collapse_table(rows: Rows) -> str:
    """The encrypted models' divergence in each format, beside the original's."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    formats = {row["format"]: row["how"] for row in rows}
    by_cell = {(row["format"], row["model"]): row for row in rows}

    def cell(format: str, model: str) -> object:
        row = by_cell.get((format, model))
        if row is None:
            return ""
        if row["KL"] is not None:
            return row["KL"]
        return "NaN" if "kl is NaN" in row["status"] else str(row["status"]).partition(":")[0]

    body = [[format, how, *(cell(format, model) for model in models)] for format, how in formats.items()]
    return markdown(["format", "how", *models], body)


def undo_table(rows: Rows) -> str:
    """In each format the protected model's divergence, and in brackets the original's."""
    suffix = ", original"
    formats = [column.removesuffix(suffix) for column in rows[0] if column.endswith(suffix)]
    body = [
        [
            *(row[column] for column in ("recipe", "who", "mode", "BF16")),
            *(f"{text(row[format])} ({text(row[format + suffix])})" for format in formats),
        ]
        for row in rows
    ]
    return markdown(["recipe", "who", "mode", "BF16", *formats], body)


def compressor_table(rows: Rows) -> str:
    """Divergence only."""
    shown = ("recipe", "original", "encrypted")
    return markdown(shown, [[row[column] for column in shown] for row in rows])
