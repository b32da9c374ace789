"""``qguard decrypt``: the way back from ``qguard encrypt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The key's file.", show_default=False)],
    workers: Annotated[int, typer.Option(min=1, help="How many files are written at the same time.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write the checkpoint back that MODEL was before qguard encrypt, bit for bit, checked against its manifest.

    Tensors that dense mode mixed come back up to rounding; how many, and how near, is printed.
    """
    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.encrypt.key import Key
    from optimum_qguard.encrypt.transform import decrypt_checkpoint

    with progress_bar("Decrypting") as update:
        report = decrypt_checkpoint(
            model, out, key=Key.load(key), workers=workers, overwrite=overwrite, progress=update
        )
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    total, inexact = len(report.tensors), len(report.inexact)
    if inexact:
        found = (
            f"{total - inexact} of {total} tensors are bit for bit what they were; the other {inexact}, which dense "
            f"mode mixed, have a relative error of {report.relative_error:.2e} at most."
        )
    else:
        found = f"All {total} tensors are bit for bit what they were."
    results().print(f"{found} Written to {out}.", soft_wrap=True)
