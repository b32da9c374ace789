"""``qguard repair``: a damaged checkpoint fine-tuned back, its weights held near those of a clean one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_CHARACTERS = 400_000
_ROWS = 50_000
_COLUMN = "text"
_TRAINING = "Training"
_MEASURING = "Measuring on the way"
_INTERRUPTED = "Interrupted runs"


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    anchor: Annotated[
        str | None,
        typer.Option(
            help="The clean checkpoint, of the same architecture, that the weights are held near to: a folder or a Hub "
            "id. Without it MODEL is only fine-tuned.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to train on: a file, or the column text of a data set; by default Python's own documentation.",
            metavar="FILE|SOURCE[:NAME[:SPLIT]]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="400")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Of the anchor: each step pulls the weights towards it by this times the learning rate.",
            show_default="250",
        ),
    ] = None,
    coupled: Annotated[
        bool, typer.Option("--coupled", help="The anchor is a penalty in the loss, strength times the mean square.")
    ] = False,
    modules: Annotated[
        str | None,
        typer.Option(
            help="Which modules it holds, with commas between.",
            show_default="q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's, constant.", show_default="2e-5", rich_help_panel=_TRAINING)
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps in which it rises.", show_default="10", rich_help_panel=_TRAINING)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.", show_default="2048", rich_help_panel=_TRAINING)
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Sequences of a step.", show_default="2", rich_help_panel=_TRAINING)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16, of forward and backward pass.",
            show_default="float32",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    device: Annotated[
        Literal["cpu"] | None,
        typer.Option(help="By default an accelerator, if there is one.", show_default=False, rich_help_panel=_TRAINING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the sequences' order, and of dropout.", show_default="0", rich_help_panel=_TRAINING),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Text to measure perplexity on, likewise: the weights that were best on it are written.",
            metavar="FILE|SOURCE[:NAME[:SPLIT]]",
            show_default=False,
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between measurements.", show_default="50", rich_help_panel=_MEASURING)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="End after so many measurements without a better one.", show_default="3", rich_help_panel=_MEASURING
        ),
    ] = None,
    keep_at: Annotated[
        str,
        typer.Option(
            help="Write the weights after these steps too, to OUT-STEP.",
            metavar="STEP,…",
            show_default=False,
            rich_help_panel=_MEASURING,
        ),
    ] = "",
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; 0: none.", show_default="100", rich_help_panel=_INTERRUPTED),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint of a run that was killed, if there is one.",
            rich_help_panel=_INTERRUPTED,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Write into OUT although it is not empty, and forget a run that was killed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Fine-tune MODEL on a text for a few steps, its weights held near a clean checkpoint's, and save it to OUT.

    OUT has MODEL's files, names and dtypes; repair.json and the model card say what was done.
    """
    from optimum_qguard.cli._arguments import comma_separated
    from optimum_qguard.cli._console import print_json, progress_bar, results

    given: dict[str, Any] = {
        "steps": steps,
        "strength": strength,
        "decoupled": False if coupled else None,
        "modules": None if modules is None else comma_separated(modules),
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "block_size": block_size,
        "accumulate": accumulate,
        "dtype": dtype,
        "seed": seed,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "checkpoint_every": checkpoint_every,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if anchor is None:
        _refuse_idle("--anchor", {"--strength": strength, "--coupled": coupled or None, "--modules": modules})
    if validation is None:
        _refuse_idle("--validation", {"--evaluate-every": evaluate_every, "--patience": patience})
    try:
        with progress_bar("Repairing") as update:
            # Imported here, because transformers' trainer imports what else is installed, and some of that prints.
            from optimum_qguard.checkpoint import open_checkpoint
            from optimum_qguard.checkpoint.output import check_output
            from optimum_qguard.repair.recipe import Recipe
            from optimum_qguard.repair.run import repair_checkpoint

            Recipe.of(options)
            check_output(out, open_checkpoint(model).folder, overwrite=overwrite)
            report = repair_checkpoint(
                model,
                out,
                anchor=anchor,
                text=_text(data),
                validation=None if validation is None else _text(validation),
                keep_at=_steps(keep_at),
                resume=resume,
                overwrite=overwrite,
                device=device,
                progress=update,
                **options,
            )
            missed = [step for step in _steps(keep_at) if step > report.steps_trained]
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            typer.echo(f"qguard: {interrupt}", err=True)
        raise
    if missed:
        typer.echo(
            f"Training ended at step {report.steps_trained}, so the weights after step "
            f"{', '.join(map(str, missed))} are not there.",
            err=True,
        )
    if as_json:
        print_json({"output": str(out), "report": report.model_dump(mode="json")})
        return
    if data is None:
        typer.echo(
            "Trained on the documentation of Python's standard library; give --data for text like the model's own.",
            err=True,
        )
    results().print(f"{report}. Written to {out}.", soft_wrap=True)


def _refuse_idle(needed: str, given: dict[str, object]) -> None:
    """Raise `RepairError` for an option that would do nothing."""
    from optimum_qguard.repair.errors import RepairError

    for name, value in given.items():
        if value is not None:
            raise RepairError(f"{name} means nothing without {needed}; give both, or leave it out")


def _text(source: str | None) -> str | list[str]:
    """The text of a file, or the texts of a data set."""
    from optimum_qguard.cli._arguments import read_text
    from optimum_qguard.evaluate import standard_library_text
    from optimum_qguard.evaluate.dataset import load_rows, parse_source
    from optimum_qguard.repair.errors import RepairError

    if source is None:
        return standard_library_text(_CHARACTERS, "training")
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".md") or (
        path.is_file() and path.suffix not in (".json", ".jsonl", ".parquet", ".csv")
    ):
        return read_text(path)
    name, configuration, split = parse_source(source)
    rows = load_rows(name, name=configuration, split=split or "train", limit=_ROWS)
    texts = [row[_COLUMN] for row in rows if isinstance(row.get(_COLUMN), str) and row[_COLUMN].strip()]
    if not texts:
        columns = ", ".join(rows[0]) if rows else "none"
        raise RepairError(f"the data set {source} has no text in a column {_COLUMN!r}; its columns are {columns}")
    return texts


def _steps(given: str) -> list[int]:
    from optimum_qguard.cli._arguments import comma_separated
    from optimum_qguard.repair.errors import RepairError

    try:
        return [int(step) for step in comma_separated(given)]
    except ValueError:
        raise RepairError(f"--keep-at is steps with commas between, not {given!r}") from None
