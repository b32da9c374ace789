"""``qguard encrypt``: a checkpoint that computes the same and that standard quantizers break."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_DENSE = "Dense mode"


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The key's file.", show_default=False)],
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a key and write it to that file.")] = False,
    strength: Annotated[
        int | None,
        typer.Option(help="Trapped channels are multiplied by 2**±N.", show_default="18"),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of each site's channels that is trapped.", show_default="0.25"),
    ] = None,
    qk_fraction: Annotated[
        float | None,
        typer.Option(help="The same between queries and keys, which KV caches notice.", show_default="0.75"),
    ] = None,
    fp16_safe: Annotated[
        bool, typer.Option("--fp16-safe", help="Weaker traps that survive inference in FP16 as well.")
    ] = False,
    mode: Annotated[
        Literal["exact", "dense"],
        typer.Option(help="exact: powers of two only, bit for bit the same; dense: harder to undo, but it rounds."),
    ] = "exact",
    kappa: Annotated[
        str | None,
        typer.Option(
            metavar="N or MIN:MAX",
            help="Condition number of each layer; 1: no conditioning.",
            show_default="28:32",
            rich_help_panel=_DENSE,
        ),
    ] = None,
    plain_layers: Annotated[
        int | None,
        typer.Option(help="How many layers are not conditioned.", show_default="4", rich_help_panel=_DENSE),
    ] = None,
    spacing: Annotated[
        int | None,
        typer.Option(help="Those are so many layers apart.", show_default="3", rich_help_panel=_DENSE),
    ] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(
            metavar="N or MIN:MAX",
            help="Size of the residue.",
            show_default="0.006:0.01",
            rich_help_panel=_DENSE,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of the residue; 0: no residue.", show_default="2", rich_help_panel=_DENSE),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Every so many layers have a residue.", show_default="3", rich_help_panel=_DENSE),
    ] = None,
    first_layer: Annotated[
        int | None,
        typer.Option(help="First layer that is mixed, from 0.", show_default="0", rich_help_panel=_DENSE),
    ] = None,
    last_layer: Annotated[
        int | None,
        typer.Option(help="Last one.", show_default="the model's last", rich_help_panel=_DENSE),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many files are written at the same time.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Rewrite MODEL so that it computes exactly the same in BF16 and breaks when quantized.

    Whoever has the key can turn it back, byte for byte, with qguard decrypt. It is not cryptography: who knows the
    method can undo much of it without the key. With --mode dense it computes the same up to rounding, and comes back
    so.
    """
    from dataclasses import replace

    from optimum_qguard.checkpoint.output import check_output
    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.encrypt.conditioning import Conditioning
    from optimum_qguard.encrypt.errors import EncryptError
    from optimum_qguard.encrypt.key import Key
    from optimum_qguard.encrypt.residue import Residue
    from optimum_qguard.encrypt.transform import FP16_SAFE, encrypt_checkpoint
    from optimum_qguard.encrypt.traps import Traps

    if fp16_safe and strength is not None and strength > FP16_SAFE.strength:
        raise EncryptError(
            f"--strength {strength} may overflow in FP16; with --fp16-safe it is at most {FP16_SAFE.strength}"
        )
    if fp16_safe and qk_fraction is not None:
        raise EncryptError("--qk-fraction does nothing with --fp16-safe, which leaves queries and keys alone")
    chosen = _given(strength=strength, fraction=fraction, qk_fraction=qk_fraction)
    traps = replace(FP16_SAFE if fp16_safe else Traps(), **chosen)
    band = _given(first_layer=first_layer, last_layer=last_layer)
    conditioned = _given(plain_layers=plain_layers, spacing=spacing) | _range("kappa", kappa)
    residual = _given(rank=rank, every=every) | _range("epsilon", epsilon)
    dense: dict[str, Any] = {}
    if mode == "dense":
        dense = {"conditioning": Conditioning(**conditioned, **band), "residue": Residue(**residual, **band)}
    elif given := conditioned | residual | band:
        option = next(iter(given)).removesuffix("_min").replace("_", "-")
        raise EncryptError(f"--{option} is an option of dense mode; add --mode dense")
    if new_key:
        check_output(out, Path(model), overwrite=overwrite)
        Key.generate().save(key)
    try:
        with progress_bar("Encrypting") as update:
            report = encrypt_checkpoint(
                model,
                out,
                key=Key.load(key),
                mode=mode,
                traps=traps,
                workers=workers,
                overwrite=overwrite,
                progress=update,
                **dense,
            )
    except BaseException:
        if new_key and not out.expanduser().exists():  # else something that it encrypted may be there
            key.expanduser().unlink()
        raise
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    sites = ", ".join(f"{count} {kind}" for kind, count in report.sites.items())
    console = results()
    rewritten, exact = report.verified + len(report.mixed), report.verified if report.mixed else "each"
    console.print(
        f"{rewritten} of {len(report.tensors)} tensors rewritten at {sum(report.sites.values())} sites ({sites}), "
        f"{exact} verified to be exact; key {report.key_fingerprint[:16]}.",
        soft_wrap=True,
    )
    if report.inexact:
        console.print(
            f"Of the {len(report.mixed)} tensors that dense mode mixed, {len(report.inexact)} will not come back bit "
            f"for bit: their relative error will be {report.relative_error:.2e} at most.",
            soft_wrap=True,
        )
    console.print(f"Written to {out}. Keep {key} secret, and a copy of it: nothing else turns it back.", soft_wrap=True)


def _given(**options: float | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _range(name: str, text: str | None) -> dict[str, float]:
    """``N`` or ``MIN:MAX``."""
    from optimum_qguard.encrypt.errors import EncryptError

    if text is None:
        return {}
    least, _, most = text.partition(":")
    try:
        return {f"{name}_min": float(least), f"{name}_max": float(most or least)}
    except ValueError:
        raise EncryptError(f"--{name} is a number, or two as MIN:MAX, not {text!r}") from None
