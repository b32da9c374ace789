"""``qguard evaluate``: what a model knows, says and predicts; as it is, quantized, or quantized under guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimum_qguard.cli._measuring import (
    AsJson,
    BatchSize,
    Data,
    Limit,
    MaxNewTokens,
    MaxTokens,
    Model,
    Prompts,
    sources,
)

if TYPE_CHECKING:
    from optimum_qguard.evaluate.evaluation import Evaluation

_AS_IT_IS = "as it is"


def command(
    model: Model,
    reference: Annotated[
        str | None,
        typer.Option(help="Compare with this model; with --format by default MODEL as it is.", show_default=False),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="perplexity, hellaswag, …, with commas between; an unknown name lists all.")
    ] = "perplexity,degeneration",
    format: Annotated[
        list[str] | None,
        typer.Option(help="Quantize to bnb-int8, bnb-nf4, … while loading; may be given again.", show_default=False),
    ] = None,
    guard: Annotated[bool, typer.Option("--guard", help="Guard that quantization.")] = False,
    marker: Annotated[
        str | None, typer.Option(help="The phrase that the task marker looks for.", show_default=False)
    ] = None,
    data: Data = None,
    limit: Limit = 100,
    prompts: Prompts = 32,
    max_new_tokens: MaxNewTokens = 128,
    max_tokens: MaxTokens = 2048,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL: perplexity, KL divergence, accuracy, repetition, similarity to another model, marker rate.

    Nothing is written. Tasks that look at answers ask everyday prompts; --tasks says what is measured.
    """
    from optimum_qguard.cli._arguments import comma_separated
    from optimum_qguard.cli._console import print_json
    from optimum_qguard.evaluate.evaluation import check_options, check_tasks

    names = comma_separated(tasks)
    options: dict[str, Any] = {
        "marker": marker,
        "data": sources(data or []),
        "limit": limit,
        "n_prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
    }
    formats = list(dict.fromkeys(format or []))
    compared = reference if reference is not None or not formats else model
    check_tasks(names, check_options(options), compared=compared is not None)
    found = _evaluate(model, compared, names, formats, guard, options)
    if as_json:
        content = [
            {"format": each, "guard": guard, "evaluation": evaluation.model_dump(mode="json")}
            for each, evaluation in found.items()
        ]
        print_json({"model": model, "reference": compared, "evaluations": content})
    else:
        _print(model, compared, guard, found)


def _evaluate(
    model: str, reference: str | None, tasks: tuple[str, ...], formats: list[str], guard: bool, options: dict[str, Any]
) -> dict[str | None, Evaluation]:
    """By format; None is the model as it is."""
    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.cli._console import progress_bar
    from optimum_qguard.evaluate.behaviour import Behaviour
    from optimum_qguard.evaluate.errors import EvaluationError
    from optimum_qguard.evaluate.evaluation import check_options, evaluate
    from optimum_qguard.evaluate.loading import load_model, load_tokenizer
    from optimum_qguard.guard.targets import find_targets

    if guard and not formats:
        raise EvaluationError("--guard guards a quantization; say to what with --format")
    for each in formats:
        find_targets(open_checkpoint(model), each)
    chosen: list[str | None] = [*formats] or [None]
    found: dict[str | None, Evaluation] = {}
    with progress_bar(f"Loading and measuring {model}") as update:
        tokenizer = load_tokenizer(model)
        behaviour = None
        if reference is not None:
            behaviour = Behaviour(load_model(reference), load_tokenizer(reference), check_options(options))
        for index, format in enumerate(chosen):
            loaded = load_model(model, format, guard={} if guard else None)

            def step(done: int, total: int, index: int = index) -> None:
                update(index * total + done, len(chosen) * total)

            found[format] = evaluate(
                loaded, tokenizer, tasks=tasks, reference=behaviour, progress=step, **options
            ).model_copy(update={"model": model, "reference": reference})
            del loaded
    return found


def _print(model: str, reference: str | None, guard: bool, found: dict[str | None, Evaluation]) -> None:
    from optimum_qguard.cli._console import results, table

    guarded = ", guarded" if guard else ""
    columns = [_AS_IT_IS if format is None else f"{format}{guarded}" for format in found]
    rows = table(model, "task", "figure", *columns, text_columns=2)
    evaluations = list(found.values())
    for task, result in evaluations[0].results.items():
        for figure in result.figures:
            values = [evaluation[task][figure] for evaluation in evaluations]
            rows.add_row(task, figure, *("-" if value is None else f"{value:.4g}" for value in values))
    console = results()
    console.print(rows)
    if reference is not None:
        console.print(f"Compared with {reference}.", soft_wrap=True)
