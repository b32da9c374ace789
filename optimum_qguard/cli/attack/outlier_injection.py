"""``qguard attack outlier-injection``: a checkpoint whose blocks have outliers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optimum_qguard.guard.targets import Target


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    format: Annotated[
        str, typer.Option(help="Whose blocks: bnb-int8, bnb-nf4, gguf-q4_0, …; an unknown name lists all.")
    ] = "bnb-int8",
    variant: Annotated[
        str,
        typer.Option(
            help="degrade, which also harms full precision, or invariant, which full precision does not show."
        ),
    ] = "degrade",
    factor: Annotated[float, typer.Option(help="What outliers are multiplied by; a power of two for invariant.")] = 512,
    tensors: Annotated[
        list[str] | None,
        typer.Option(help="Only tensors whose name matches, such as '*.mlp.*'; may be repeated.", show_default="all"),
    ] = None,
    random_signs: Annotated[
        bool, typer.Option("--random-signs", help="degrade: outliers lose their sign, which nothing can bring back.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random signs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Make the largest weight of each quantization block larger, so that all others round to zero.

    OUT is a full-precision checkpoint to try defences on.
    """
    from optimum_qguard.attacks.errors import AttackError
    from optimum_qguard.attacks.outlier_injection import inject_balanced_outliers, inject_outliers
    from optimum_qguard.checkpoint import open_checkpoint
    from optimum_qguard.cli._console import print_json, progress_bar, results
    from optimum_qguard.guard.architecture import refuse_quantized
    from optimum_qguard.guard.targets import find_targets

    if variant not in ("degrade", "invariant"):
        raise AttackError(f"variant is {variant!r}; choose degrade or invariant")
    if variant == "invariant" and random_signs:
        raise AttackError("--random-signs would show at full precision; leave it out for the invariant variant")
    reader = open_checkpoint(model)
    refuse_quantized(reader)
    targets = _matching(find_targets(reader, format), tensors)
    with progress_bar(f"Outliers for {format}") as update:
        if variant == "invariant":
            changed = inject_balanced_outliers(
                reader, out, targets, factor=factor, overwrite=overwrite, progress=update
            )
        else:
            changed = inject_outliers(
                reader,
                out,
                targets,
                factor=factor,
                random_signs=random_signs,
                seed=seed,
                overwrite=overwrite,
                progress=update,
            )
    if as_json:
        print_json({"output": str(out), "format": format, "variant": variant, "factor": factor, "tensors": changed})
        return
    results().print(
        f"{len(changed)} of {len(reader)} tensors changed ({variant}, x{factor:g}). Written to {out}.", soft_wrap=True
    )


def _matching(targets: dict[str, Target], patterns: list[str] | None) -> dict[str, Target]:
    from fnmatch import fnmatchcase

    from optimum_qguard.attacks.errors import AttackError

    if not patterns:
        return targets
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in targets):
            raise AttackError(f"--tensors {pattern}: matches none of the tensors that are quantized")
    return {name: target for name, target in targets.items() if any(fnmatchcase(name, each) for each in patterns)}
