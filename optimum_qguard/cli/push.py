"""``qguard push``: a checkpoint that a verb wrote, on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="The folder that guard, encrypt or repair wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Made if missing.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Write to this branch, made if missing.", show_default="main")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's title.")] = None,
    collapse: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What qguard collapse --json printed; its figures go into the card."),
    ] = None,
    include_pickles: Annotated[
        bool, typer.Option("--include-pickles", help="Upload pickle files too; opening those can run code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Upload OUT to the Hugging Face Hub as one commit.

    The card that is there is kept: what was done is added to it, in words and as metadata. Keys and hidden files are
    never uploaded. Needs a token that may write: set HF_TOKEN, or run hf auth login.
    """
    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.hub.push import push

    with progress_bar("Uploading"):
        done = push(
            out,
            repository,
            collapse=collapse,
            private=True if private else None,
            create_pr=create_pr,
            revision=revision,
            commit_message=commit_message,
            include_pickles=include_pickles,
        )
    if as_json:
        names = ("repo_id", "commit", "url", "pull_request", "files", "deleted", "left_out")
        print_json({name: getattr(done, name) for name in names})
        return
    console = results()
    console.print(f"{len(done.files)} files in {done.repo_id}: {done.url}", soft_wrap=True)
    for words, files in (("Deleted there", done.deleted), ("Not uploaded", done.left_out)):
        if files:
            console.print(f"{words}: {', '.join(files)}", soft_wrap=True)
