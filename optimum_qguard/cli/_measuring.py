"""Arguments of the verbs that measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="TASK=SOURCE[:NAME[:SPLIT]]: a data set's id or a file for a task; may be given again.",
        show_default=False,
    ),
]
Limit = Annotated[int, typer.Option(help="Questions of each data set.")]
Prompts = Annotated[int, typer.Option(help="Prompts, for the tasks that look at answers.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of the longest answer.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of the text that perplexity and KL divergence are of.")]
BatchSize = Annotated[int, typer.Option(help="Prompts in one pass.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def sources(given: Sequence[str]) -> dict[str, str]:
    """Data sets by task, from ``TASK=SOURCE``.

    Raises:
        EvaluationError: one that is not written so.
    """
    from optimum_qguard.evaluate.errors import EvaluationError

    found = {}
    for each in given:
        task, equals, source = each.partition("=")
        if not (task and equals and source):
            raise EvaluationError(f"--data {each}: give it as TASK=SOURCE, for instance squad=rajpurkar/squad")
        found[task] = source
    return found
