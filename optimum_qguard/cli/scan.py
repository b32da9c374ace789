"""``qguard scan``: what quantization would bring out of checkpoints, said from their weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_qguard.scan.finding import Severity
    from optimum_qguard.scan.report import ScanReport

EXIT_CLEAN = 0
EXIT_FINDINGS = 1
EXIT_UNSETTLED = 2

_HOW = "How to look"
_REPORT = "The report"


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders, safetensors files, or Hub ids with optional @revision.",
            show_default=False,
        ),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option(help="A text file with one MODEL a line; # begins a comment.", show_default=False)
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Look at every weight, not a sample.", rich_help_panel=_HOW)
    ] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Run the models too.", rich_help_panel=_HOW)] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What MODEL claims to be a fine-tune of.", show_default=False, rich_help_panel=_HOW
        ),
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(
            help="Only these, with commas between; an unknown name lists all.",
            show_default="all",
            rich_help_panel=_HOW,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Models at a time; what is left over works on the tensors of each.",
            show_default="2",
            rich_help_panel=_HOW,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="ray: on a cluster that is running already.", rich_help_panel=_HOW),
    ] = "local",
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Look at the same weights as the scan whose report has this seed (hexadecimal).",
            show_default="random",
            rich_help_panel=_HOW,
        ),
    ] = None,
    format: Annotated[
        Literal["text", "json", "sarif", "html"] | None,
        typer.Option(help="How the report is written.", show_default="text", rich_help_panel=_REPORT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=_REPORT)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the report to this file, and print the verdicts only.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    fail_on: Annotated[
        Literal["note", "warning", "error"],
        typer.Option(help="Exit with 1 for findings of this severity and above.", rich_help_panel=_REPORT),
    ] = "warning",
) -> int:
    """Look inside the weights of models for what quantization would bring out.

    Nothing in a model is run (but for --deep, and then without its code) or unpickled. Of models on the Hub only the
    bytes that are looked at are fetched.

    Exit code: 0 if all are clean; 1 if any has findings at or above --fail-on; else 2 if any could not be judged:
    inconclusive, nothing in it that can be scanned, or not to be opened.
    """
    if as_json and format not in (None, "json"):
        raise typer.BadParameter(f"--json and --format {format} contradict each other")
    from optimum_qguard.checkpoint import CheckpointError, atomic_write
    from optimum_qguard.checkpoint.errors import printable
    from optimum_qguard.cli._arguments import comma_separated
    from optimum_qguard.cli._console import progress_bar
    from optimum_qguard.scan.many import scan_many
    from optimum_qguard.scan.writers import get_writer

    names = list(dict.fromkeys([*(models or []), *([] if from_file is None else _read_list(from_file))]))
    if not names:
        raise typer.BadParameter("no MODEL given")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise CheckpointError(f"{output}: a folder, or in none that there is; name a file")
    write = get_writer("json" if as_json else format or "text")
    with progress_bar(f"Scanning {_what(names)}", quiet=deep) as update:
        reports = scan_many(
            names,
            workers=workers,
            progress=update,
            detectors=None if detectors is None else comma_separated(detectors),
            engine=engine,
            base=base,
            full=full,
            deep=deep,
            seed=None if seed is None else _seed(seed),
        )
    for report in reports:
        if not report.coverage.tensors and report.verdict == "inconclusive":
            print(f"qguard: {printable(report.reason)}", file=sys.stderr)
    content = write(reports)
    if output is None:
        sys.stdout.write(content)
    else:
        atomic_write(output, content)
        for report in reports:
            print(f"{report.verdict}: {printable(report.name)}")
    return exit_code(reports, fail_on)


def exit_code(reports: Sequence[ScanReport], fail_on: Severity) -> int:
    """The worst of all models: findings are worse than not to know."""
    if any(report.has_findings(fail_on) for report in reports):
        return EXIT_FINDINGS
    return EXIT_CLEAN if all(report.complete for report in reports) else EXIT_UNSETTLED


def _what(models: Sequence[str]) -> str:
    from optimum_qguard.checkpoint.errors import printable

    return printable(models[0]) if len(models) == 1 else f"{len(models)} models"


def _read_list(path: Path) -> list[str]:
    from optimum_qguard.cli._arguments import read_text

    lines = read_text(path).splitlines()
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def _seed(text: str) -> int:
    try:
        seed = int(text, 16)
    except ValueError:
        seed = -1
    if not 0 <= seed < 1 << 64:
        raise typer.BadParameter(f"--seed {text!r} is no hexadecimal number below 2**64")
    return seed
