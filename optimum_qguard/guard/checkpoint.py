"""A full-precision checkpoint noised for a format, for people whose quantizer is not one of transformers': llama.cpp,
above all.

Where the quantizer's grid depends on the weights' extremes only, every weight is moved to one of its two neighbouring
grid points, unbiased; the quantizer, given those, chooses exactly these symbols. Where it searches its grid (K-quants),
Gaussian noise of the tensor's median half-width is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from optimum_qguard.checkpoint import CheckpointReader, merge_card, open_checkpoint
from optimum_qguard.checkpoint.atomic import atomic_write
from optimum_qguard.checkpoint.origin import name_and_revision
from optimum_qguard.checkpoint.output import check_output, check_space, output_folder
from optimum_qguard.checkpoint.protection import MANIFEST_FILE, protection
from optimum_qguard.checkpoint.writer import write_transformed
from optimum_qguard.guard.architecture import model_class, names_in_model, refuse_protected, refuse_quantized
from optimum_qguard.guard.calibration import Progress, calibrate
from optimum_qguard.guard.compensation import hand_over
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.noise import Draw, Method, draw
from optimum_qguard.guard.outliers import clip_outliers
from optimum_qguard.guard.prerounding import Prerounding
from optimum_qguard.guard.random import RandomStream, fresh_seed
from optimum_qguard.guard.rebalance import Rescaling, find_balanced_outliers, rescaled_channels
from optimum_qguard.guard.report import TAGS, GuardReport, TensorReport
from optimum_qguard.guard.targets import Target, checkpoint_formats, find_targets, unknown_format

_GGUF = "gguf-"


def guard_checkpoint(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> GuardReport:
    """Write a full-precision checkpoint whose quantization to ``format`` is guarded. Peak memory is a few tensors.

    The output has the input's files, names, shapes and dtypes; beside them lies ``qguard.json``, and the model card
    has a section on what was done.

    Args:
        model: a folder, or a Hub id with optional ``@revision``.
        out: the output folder, there whole or not at all.
        format: one of `checkpoint_formats`.
        overwrite: see `output_folder`.
        progress: called after each tensor; for ``noise="global"`` from the start again after calibrating.
        options: ``method``, ``noise``, ``multiplier``, ``compensate``, ``clip_outliers`` and ``seed`` as for
            `QGuardConfig`. With ``compensate`` the whole model is in memory for a while.

    Raises:
        QGuardConfigError: options that make no sense, an unknown format.
        CheckpointError: the input cannot be read or the output not written.
        QGuardError: quantized already, or not to be guarded for this format.
        WeightError: NaN or infinite weights.
    """
    if format.lower() not in checkpoint_formats() and not format.startswith(_GGUF):
        raise unknown_format(format)
    guarding = QGuardConfig(BitsAndBytesConfig(load_in_8bit=True), **options)
    reader = open_checkpoint(model)
    refuse_quantized(reader)
    refuse_protected(str(model), protection(reader.file(MANIFEST_FILE)))
    check_output(out, reader.folder, overwrite=overwrite)
    check_space(out, reader.n_bytes)
    targets = find_targets(reader, format)
    total = sum(target.weights for target in targets.values())
    noise = _Noise(guarding, reader, format, progress)
    tensors: list[TensorReport] = []

    rescalings: dict[str, list[Rescaling]] = {}
    if guarding.outlier_threshold is not None:
        files = [reader.file(shard) for shard in reader.shards]
        rescalings = find_balanced_outliers(files, str(reader.config.get("model_type")), targets)

    def mend(name: str, tensor: Tensor) -> tuple[Tensor, int]:
        """The tensor without planted outliers, and how many were clipped."""
        for rescaling in rescalings.get(name, ()):
            tensor = rescaling.apply(tensor)
        if name not in targets or guarding.outlier_threshold is None:
            return tensor, 0
        target = targets[name]
        weight, clipped = clip_outliers(target.oriented(tensor), target.format, guarding.outlier_threshold)
        return target.oriented(weight), clipped

    if guarding.compensate is not None:
        noise.preround(guarding.compensate, targets, reader, mend)

    def randomize(name: str, tensor: Tensor) -> Tensor:
        tensor, clipped = mend(name, tensor)
        if name not in targets:
            return tensor
        target = targets[name]
        weight = target.oriented(tensor)
        drawn, method = noise.draw(target, weight)
        tensors.append(
            TensorReport(
                name=name,
                format=str(target.format),
                method=method,
                amplitude=drawn.amplitude,
                weights=target.weights,
                share_changed=drawn.share_changed,
                sampled=drawn.sampled,
                clipped=clipped,
                rescaled=rescaled_channels(rescalings.get(name, ())),
            )
        )
        if progress is not None:
            progress(sum(tensor.weights for tensor in tensors), total)
        return target.oriented(drawn.weight)

    name, revision = name_and_revision(model, reader)
    with output_folder(out, reader.folder, overwrite=overwrite, flushed=reader.shards) as staging:
        write_transformed(reader, staging, randomize)
        report = GuardReport(
            model=name,
            revision=revision,
            method=guarding.method,
            noise=guarding.noise,
            multiplier=guarding.multiplier,
            seed=f"{noise.seed:064x}",
            fresh_seed=guarding.seed is None,
            samples=None if noise.prerounding is None else noise.prerounding.report,
            quantization_config={"format": format},
            tensors=sorted(tensors, key=lambda tensor: tensor.name),
        )
        merge_card(staging, section_id="guard", markdown=_card_section(report, format), tags=TAGS)
        atomic_write(staging / MANIFEST_FILE, report.model_dump_json(indent=2) + "\n")
    report.warn_if_clipped()
    return report


class _Noise:
    """The noise of one checkpoint."""

    def __init__(self, config: QGuardConfig, reader: CheckpointReader, format: str, progress: Progress | None) -> None:
        self._config = config
        self.seed = fresh_seed() if config.seed is None else int(config.seed)
        self._amplitude = None if isinstance(config.noise, str) else float(config.noise)
        if config.noise == "global":
            self._amplitude = calibrate(
                reader, format, progress=progress, outlier_threshold=config.outlier_threshold
            ).global_half_width
        self.prerounding: Prerounding | None = None
        self._in_model: dict[str, str] = {}

    def preround(
        self,
        samples: str | Sequence[str],
        targets: Mapping[str, Target],
        reader: CheckpointReader,
        mend: Callable[[str, Tensor], tuple[Tensor, int]],
    ) -> None:
        """Choose the symbols of all tensors whose quantizer will choose them again, with error feedback, of the model
        as ``mend`` makes its tensors."""
        formats = {
            name: target.format
            for name, target in targets.items()
            if target.format.fixed_for(reader.tensors[name].dtype)
        }
        if not formats:
            raise QGuardConfigError(
                f"{next(iter(targets.values())).format} has no grid that guard knows beforehand, so errors cannot be "
                "compensated on it: leave compensate None"
            )
        _, found = model_class(reader)
        self.prerounding = Prerounding(samples, self.seed)
        model = found.from_pretrained(reader.folder, dtype="auto")
        self._in_model = names_in_model(model, reader)
        in_checkpoint = {own: name for name, own in self._in_model.items()}
        for own, parameter in model.named_parameters():
            parameter.data = mend(in_checkpoint.get(own, own), parameter.data)[0]
        self.prerounding.run(model, {self._in_model.get(name, name): format for name, format in formats.items()})

    def draw(self, target: Target, weight: Tensor) -> tuple[Draw, Method | Literal["compensated"]]:
        """The randomized tensor in its own dtype, and the method that was used."""
        method = self._config.method
        if method == "stochastic" or (method == "auto" and not self._config.has_amplitude):
            for compensated in (True, False):
                drawn = self._round(target, weight, compensated)
                if drawn is not None:
                    return drawn, "compensated" if compensated else "stochastic"
            if method == "stochastic":
                raise QGuardConfigError(
                    f"{target.name}: {target.format} does not give stochastically rounded {weight.dtype} weights back "
                    "as they were chosen; use method 'auto' or 'gaussian'"
                )
        method, per_cell = self._config.method_for(known=False, estimated=False)
        drawn = draw(
            weight,
            target.format,
            method,
            self._stream(target),
            amplitude=None if self._amplitude is None else self._amplitude * self._config.multiplier,
            half_widths=self._config.multiplier,
            per_cell=per_cell,
            name=target.name,
        )
        return drawn, method

    def _round(self, target: Target, weight: Tensor, compensated: bool) -> Draw | None:
        """Stochastic rounding, with error feedback or without. ``None`` if there is no such, or if the quantizer would
        not choose the same symbols for the rounded weights: its grid is not known beforehand, or the weights' dtype
        cannot hold the grid (bfloat16 far from zero)."""
        if not target.format.fixed_for(weight.dtype):
            return None
        if compensated:
            name = self._in_model.get(target.name, target.name)
            codes = None if self.prerounding is None else self.prerounding.codes(name, weight)
            if codes is None:
                return None
            exact = hand_over(weight, target.format, codes, dtype=torch.float32, name=target.name)
        else:
            exact = draw(
                weight, target.format, "stochastic", self._stream(target), dtype=torch.float32, name=target.name
            )
        stored = exact.weight.to(weight.dtype)
        if weight.dtype != torch.float32:
            chosen = target.format.quantize(exact.weight, target.name).block_codes
            if not torch.equal(target.format.quantize(stored, target.name).block_codes, chosen):
                return None
        return replace(exact, weight=stored)

    def _stream(self, target: Target) -> RandomStream:
        return RandomStream(self.seed, target.name)


def _card_section(report: GuardReport, format: str) -> str:
    return (
        f"## Guarded for quantization to {format}\n\n"
        f"The weights of this full-precision checkpoint were randomized by optimum-qguard {report.package_version} "
        f"({report.described_method}), so that behaviour planted for the rounding of {format} does not survive it: "
        f"{len(report.tensors)} tensors, {report.weights:,} weights; {report.share_changed:.1%} of them left the "
        f"quantization cell they were in.{report.described_clipping} Quantize it to {format} and to nothing else. "
        f"Details and seed: `{MANIFEST_FILE}`.\n"
    )
