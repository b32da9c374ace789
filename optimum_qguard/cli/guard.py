"""``qguard guard``: quantize with guard and save, or noise a full-precision checkpoint for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optimum_qguard.guard.report import GuardReport

_CALIBRATION_CHARACTERS = 2000
_CALIBRATION_TEXTS = 32
_MOST_CALIBRATION_TEXTS = 256


def command(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id with optional @revision.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            help="bnb-int8, bnb-nf4, torchao-int8, gptq-4, gguf-q4_k_m, …; an unknown name lists all.",
            show_default=False,
        ),
    ],
    method: Annotated[str, typer.Option(help="auto, stochastic, gaussian or uniform.")] = "auto",
    noise: Annotated[
        str, typer.Option(help="Amplitude of gaussian or uniform noise: per_layer, global, per_cell or a number.")
    ] = "per_layer",
    multiplier: Annotated[float, typer.Option(help="Factor on that amplitude.")] = 1.0,
    compensate: Annotated[
        str | None,
        typer.Option(
            help="Push rounding errors onto later weights, by what the model's layers read on its own generations "
            "(auto) or on a text file.",
            metavar="auto|FILE",
            show_default="auto for GPTQ, else none",
        ),
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="Only to repeat an experiment: by default the noise cannot be foreseen.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of what is not quantized: auto (the checkpoint's), bfloat16, float16 or float32.")
    ] = "auto",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, for formats that leave the choice.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Text file to calibrate GPTQ on; by default Python's own documentation.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUT although it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Quantize MODEL with its rounding randomized, and save it to OUT.

    With a gguf-… format (or the bare name of a number format) OUT is a full-precision checkpoint, randomized for people
    who quantize it with llama.cpp (or another program) themselves.
    """
    from optimum_qguard.guard.backends import preset_names
    from optimum_qguard.guard.targets import checkpoint_formats, unknown_format

    options: dict[str, Any] = {
        "method": method,
        "noise": _number(noise),
        "multiplier": multiplier,
        "compensate": compensate if compensate in (None, "auto") else _calibration_texts(Path(compensate)),
        "seed": _seed(seed),
        "overwrite": overwrite,
    }
    if format in preset_names():
        report = _quantize(model, out, format, dtype, group_size, dataset, options)
    elif format.startswith("gguf-") or format in checkpoint_formats():
        _refuse_library_options(format, dtype=dtype != "auto", group_size=group_size, dataset=dataset)
        report = _noise(model, out, format, options)
    else:
        raise unknown_format(format)
    _print(report, out, format, as_json)


def _quantize(
    model: str,
    out: Path,
    format: str,
    dtype: str,
    group_size: int | None,
    dataset: Path | None,
    options: dict[str, Any],
) -> GuardReport:
    from optimum_qguard.cli._console import progress_bar
    from optimum_qguard.guard.quantize import calibrates, quantize_checkpoint

    texts = _calibration_texts(dataset) if calibrates(format) else None
    if texts is None:
        _refuse_library_options(format, dataset=dataset)
    with progress_bar(f"Quantizing to {format}"):
        report = quantize_checkpoint(
            model, out, format, dtype=dtype, group_size=group_size, calibration_texts=texts, **options
        )
    if texts is not None and dataset is None:
        typer.echo(
            "Calibrated on the documentation of Python's standard library; "
            "give --dataset FILE for text like what the model will meet.",
            err=True,
        )
    return report


def _noise(model: str, out: Path, format: str, options: dict[str, Any]) -> GuardReport:
    from optimum_qguard.cli._console import progress_bar
    from optimum_qguard.guard.checkpoint import guard_checkpoint

    with progress_bar(f"Randomizing for {format}") as update:
        return guard_checkpoint(model, out, format, progress=update, **options)


def _calibration_texts(dataset: Path | None) -> list[str]:
    from optimum_qguard.cli._arguments import read_text
    from optimum_qguard.guard.errors import QGuardConfigError

    if dataset is None:
        from optimum_qguard.evaluate import standard_library_text

        text = standard_library_text(_CALIBRATION_CHARACTERS * _CALIBRATION_TEXTS, "training")
    else:
        text = read_text(dataset)
        if not text.strip():
            raise QGuardConfigError(f"{dataset}: has no text in it")
    pieces = [text[start : start + _CALIBRATION_CHARACTERS] for start in range(0, len(text), _CALIBRATION_CHARACTERS)]
    return pieces[:_MOST_CALIBRATION_TEXTS]


def _refuse_library_options(format: str, **given: object) -> None:
    from optimum_qguard.guard.errors import QGuardConfigError

    for name, value in given.items():
        if value is not None and value is not False:
            raise QGuardConfigError(f"--{name.replace('_', '-')} means nothing for {format}; leave it out")


def _number(noise: str) -> str | float:
    try:
        return float(noise)
    except ValueError:
        return noise


def _seed(seed: str | None) -> str | int | None:
    """A report's seed has 64 hexadecimal digits; anything shorter is a decimal number."""
    return int(seed) if seed is not None and len(seed) < 64 and seed.lstrip("-").isdecimal() else seed


def _print(report: GuardReport, out: Path, format: str, as_json: bool) -> None:
    from optimum_qguard.cli._console import number, print_json, results, share, table
    from optimum_qguard.formats import format_names, get_format
    from optimum_qguard.guard.calibration import by_pattern

    if as_json:
        print_json({"output": str(out), "format": format, "report": report.model_dump(mode="json")})
        return
    rows = table(
        f"{report.model} → {format}",
        "tensor",
        "becomes",
        "method",
        "tensors",
        "weights",
        "noise",
        "changed",
        text_columns=3,
    )
    names = {str(get_format(name)): name for name in format_names()}
    for pattern, tensors in by_pattern(report.tensors).items():
        for kind in dict.fromkeys((tensor.format, tensor.method) for tensor in tensors):
            same = [tensor for tensor in tensors if (tensor.format, tensor.method) == kind]
            weights = sum(tensor.weights for tensor in same)
            amplitudes = sorted(tensor.amplitude for tensor in same if tensor.amplitude is not None)
            changed = sum(tensor.share_changed * tensor.weights for tensor in same) / max(weights, 1)
            amplitude = amplitudes[len(amplitudes) // 2] if amplitudes else None
            becomes = names.get(kind[0], kind[0])
            rows.add_row(pattern, becomes, kind[1], str(len(same)), f"{weights:,}", number(amplitude), share(changed))
    console = results()
    console.print(rows)
    console.print(f"{report}.", soft_wrap=True)
    console.print(f"Written to {out}.", soft_wrap=True)
