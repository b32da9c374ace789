"""Uploads what a verb wrote, with what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.publish import Published, publish
from optimum_qguard.hub.card import collapse_results, read_collapse


def push(folder: str | Path, repo_id: str, *, collapse: str | Path | None = None, **options: Any) -> Published:
    """Upload a folder to the Hub as one commit, its card merged with the one there.

    Args:
        folder: what ``qguard guard``, ``encrypt`` or ``repair`` wrote, or a saved guarded model.
        repo_id: ``name`` or ``org/name``; made if missing.
        collapse: a file that ``qguard collapse --json`` printed, whose figures go into the card as ``model-index``
            results.
        options: see `publish`: ``private``, ``create_pr``, ``revision``, ``commit_message``, ``token``,
            ``include_pickles``.

    Raises:
        CheckpointError: see `publish`; or ``collapse`` is no such file.
    """
    if collapse is None:
        return publish(folder, repo_id, **options)
    measured = read_collapse(collapse)
    return publish(
        folder, repo_id, results=collapse_results(measured), block={"collapse": measured.statuses}, **options
    )
