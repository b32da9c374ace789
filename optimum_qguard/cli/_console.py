"""What verbs print with: results on standard output, progress on standard error, and libraries silenced."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def print_json(content: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def results() -> Console:
    """Standard output; as wide as tables need where it is not a terminal. Brackets and colons in names mean nothing."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=160)


def table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """A table whose first ``text_columns`` columns are words and the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        if index < text_columns:
            made.add_column(column, overflow="fold")
        else:
            made.add_column(column, justify="right", no_wrap=True)
    return made


@contextlib.contextmanager
def progress_bar(description: str, *, quiet: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, with the libraries quiet below it; yields what takes how much is done and of how much.

    Without ``quiet`` the libraries are left alone, and transformers is not imported for that, which takes seconds.
    Until it is told, the bar shows that and how long work goes on. Without a terminal nothing is drawn.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with (
        Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bar,
        quiet_libraries() if quiet else contextlib.nullcontext(),
    ):
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' warnings, log lines, printing and progress bars away from the user; errors are raised."""
    import transformers

    disabled = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled()
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars:
                transformers.utils.logging.enable_progress_bar()


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}"


def number(value: float | None) -> str:
    """A small number in three digits; a dash for none."""
    return "-" if value is None else f"{value:.2e}"
