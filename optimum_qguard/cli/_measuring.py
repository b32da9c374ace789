"""Arguments of the verbs that measure."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_qguard.evaluate.errors import EvaluationError


def sources(given: Sequence[str]) -> dict[str, str]:
    """Data sets by task, from ``TASK=SOURCE``.

    Raises:
        EvaluationError: one that is not written so.
    """
    found = {}
    for each in given:
        task, equals, source = each.partition("=")
        if not (task and equals and source):
            raise EvaluationError(f"--data {each}: give it as TASK=SOURCE, for instance squad=rajpurkar/squad")
        found[task] = source
    return found
