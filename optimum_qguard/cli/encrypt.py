"""``qguard encrypt``: a checkpoint that computes the same and that standard quantizers break."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The key's file.", show_default=False)],
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a key and write it to that file.")] = False,
    strength: Annotated[
        int | None,
        typer.Option(help="Trapped channels are multiplied by 2**±N.  [default: 18]", show_default=False),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of each site's channels that is trapped.  [default: 0.25]", show_default=False),
    ] = None,
    fp16_safe: Annotated[
        bool, typer.Option("--fp16-safe", help="Weaker traps that survive inference in FP16 as well.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="How many files are written at the same time.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Rewrite MODEL so that it computes exactly the same in BF16 and breaks when quantized.

    Whoever has the key can turn it back, byte for byte, with qguard decrypt. It is not cryptography: who knows the
    method can undo much of it without the key.
    """
    from dataclasses import replace

    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.encrypt.key import Key
    from optimum_qguard.encrypt.transform import FP16_SAFE, encrypt_checkpoint
    from optimum_qguard.encrypt.traps import Traps

    traps = FP16_SAFE if fp16_safe else Traps()
    if strength is not None:
        traps = replace(traps, strength=strength)
    if fraction is not None:
        traps = replace(traps, fraction=fraction)
    if new_key:
        Key.generate().save(key)
    try:
        with progress_bar("Encrypting") as update:
            report = encrypt_checkpoint(
                model, out, key=Key.load(key), traps=traps, workers=workers, overwrite=overwrite, progress=update
            )
    except BaseException:
        if new_key:
            key.expanduser().unlink()  # nothing was encrypted with it
        raise
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    sites = ", ".join(f"{count} {kind}" for kind, count in report.sites.items())
    console = results()
    console.print(
        f"{report.verified} of {len(report.tensors)} tensors rewritten at {sum(report.sites.values())} sites "
        f"({sites}), each verified to be exact; key {report.key_fingerprint[:16]}.",
        soft_wrap=True,
    )
    console.print(f"Written to {out}. Keep {key} secret, and a copy of it: nothing else turns it back.", soft_wrap=True)
