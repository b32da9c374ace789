"""Repairs a damaged checkpoint: a short fine-tune that holds its weights near those of a clean one."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from optimum_qguard.checkpoint import CheckpointError, CheckpointReader, open_checkpoint
from optimum_qguard.checkpoint.description import REPAIR_FILE
from optimum_qguard.checkpoint.origin import name_and_revision
from optimum_qguard.checkpoint.output import check_output, check_space, output_folder
from optimum_qguard.checkpoint.protection import MANIFEST_FILE
from optimum_qguard.checkpoint.writer import write_transformed
from optimum_qguard.repair import loop
from optimum_qguard.repair.anchor import Anchor, AnchorCallback
from optimum_qguard.repair.blocks import Blocks, passes, token_blocks
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.recipe import Recipe
from optimum_qguard.repair.report import Loss, RepairReport, Validation, perplexity_of
from optimum_qguard.repair.source import check_source, check_vocabulary, load_model, load_tokenizer
from optimum_qguard.repair.stored import stored_tensors
from optimum_qguard.repair.workspace import Workspace, workspace

# Of a checkpoint: each weight and AdamW's two moments of it, in float32.
_BYTES_PER_WEIGHT = 12


def repair_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    anchor: str | Path | None,
    text: str | Sequence[str],
    validation: str | Sequence[str] | None = None,
    keep_at: Sequence[int] = (),
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> RepairReport:
    """Fine-tune a checkpoint on a text, its weights held near an anchor's, and write it in its own layout and dtype.

    The text's blocks come in random order, each once before any comes again. While it runs, checkpoints lie in a
    hidden folder beside ``out``; a run that was killed and goes on with ``resume`` ends with the same weights, on a CPU
    bit for bit, as one that was not.

    Args:
        model: a folder, or a Hub id with optional ``@revision``.
        out: the output folder, there whole or not at all.
        anchor: a clean checkpoint of the same architecture, likewise; ``None``: plain fine-tuning.
        text: one, or several.
        validation: text to measure perplexity on, in blocks, before the first step and on the way. What is written are
            then the weights that were best on it.
        keep_at: the weights after these steps are written too, to ``out-STEP``.
        resume: go on from the last checkpoint of a run that was killed, if there is one. Model, text, block size,
            ``accumulate``, validation text and seed must be the same; the other settings may be others.
        overwrite: see `output_folder`; and what a killed run left is deleted, unless this one goes on from it.
        device: ``"cpu"``; by default an accelerator, if there is one.
        progress: gets how many steps are done, and of how many.
        options: of the `Recipe`: ``steps``, ``strength``, ``learning_rate`` and so on.

    Raises:
        RepairError: options that make no sense; no tokenizer; a text shorter than a block; a model that is quantized,
            protected or no causal language model; an anchor of another architecture; a loss that is no number, after
            which ``resume`` with a lower rate goes on from the last checkpoint.
        CheckpointError: the model cannot be read or the output not written.
    """
    recipe = Recipe.of(options)
    if device not in (None, "cpu"):
        raise RepairError(
            f"device is {device!r}; it is 'cpu' or None (CUDA_VISIBLE_DEVICES chooses among accelerators)"
        )
    if anchor is not None:
        recipe.check_pull()
    reader = open_checkpoint(model)
    check_source(model, reader, recipe.block_size)
    final = Path(out).expanduser()
    kept = _kept(final, keep_at, recipe.steps)
    check_output(final, reader.folder, overwrite=overwrite)
    for folder in kept.values():
        check_output(folder, reader.folder, overwrite=overwrite or resume)
    tokenizer = load_tokenizer(reader)
    size = recipe.block_size
    blocks = token_blocks(tokenizer, text, size)
    held_out = None if validation is None else token_blocks(tokenizer, validation, size, name="the validation text")
    repair = _Repair(model, reader, anchor, recipe, kept)
    for folder in (final, *kept.values()):
        if repair.anchor is not None and folder.resolve() == repair.anchor.reader.folder.resolve():
            raise RepairError(f"{folder}: is the anchor's folder; name another folder to write to")
    for each in (blocks, held_out):
        if each is not None:
            check_vocabulary(repair.model, each)
    settings = {
        "model": str(reader.folder.resolve()),
        "text": _digest(blocks),
        "validation text": None if held_out is None else _digest(held_out),
        "block size": size,
        "number of blocks in a step": recipe.accumulate,
        "seed": recipe.seed,
    }
    with workspace(final, resume=resume, overwrite=overwrite) as work:
        work.begin(settings, resume=resume)
        _check_steps(work, recipe.steps, kept)
        check_space(final, _needed(repair, validated=held_out is not None) - work.size)
        try:
            step, history = repair.train(work, blocks, held_out, device, progress, overwrite=overwrite or resume)
            return repair.write(final, step, history, overwrite=overwrite)
        except loop.Diverged as error:
            raise RepairError(f"{error}; {_advice(work, error)}") from None
        except KeyboardInterrupt:
            if work.checkpoint is None:
                raise
            step = work.checkpoint[0]
            raise KeyboardInterrupt(f"the checkpoint of step {step} is kept; go on from it with --resume") from None
        except torch.OutOfMemoryError as error:
            raise RepairError(
                f"out of memory at blocks of {size} tokens; give a smaller block size, or dtype bfloat16"
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = _writing_problem(error)
            if problem is None:
                raise
            raise CheckpointError(f"{out}: {problem}") from error


class _Repair:
    """One checkpoint under repair."""

    def __init__(
        self,
        name: str | Path,
        reader: CheckpointReader,
        anchor: str | Path | None,
        recipe: Recipe,
        kept: dict[int, Path],
    ) -> None:
        self.reader = reader
        self.recipe = recipe
        self.kept = kept
        self.started = time.monotonic()
        self.name, self.revision = name_and_revision(name, reader)
        self.model = load_model(reader)
        stored_tensors(self.model, reader)  # raises what is to be known before training
        self.anchor_name: str | None = None
        self.anchor_revision: str | None = None
        self.anchor: Anchor | None = None
        if anchor is not None:
            self.anchor = Anchor.open(anchor, self.model, modules=recipe.modules)
            self.anchor_name, self.anchor_revision = name_and_revision(anchor, self.anchor.reader)
        self.distance_before = self._distance()

    def train(
        self,
        work: Workspace,
        blocks: Tensor,
        held_out: Tensor | None,
        device: str | None,
        progress: Callable[[int, int], None] | None,
        *,
        overwrite: bool,
    ) -> tuple[int, list[dict[str, Any]]]:
        """Train the model, and leave in it the weights to write.

        Returns:
            The step whose weights these are, and the log.
        """
        recipe, checkpoint = self.recipe, work.checkpoint
        best = None if held_out is None else loop.KeepBest(work.folder, recipe.patience)
        steps = recipe.steps
        if checkpoint is not None and loop.exhausted(work.history(), None if best is None else recipe.patience):
            steps = checkpoint[0]  # it was killed after it had stopped early
        trainer = loop.RepairTrainer(
            model=self.model,
            args=loop.training_arguments(
                recipe,
                work.folder,
                steps=steps,
                validated=held_out is not None,
                resumed=checkpoint is not None,
                device=device,
            ),
            train_dataset=Blocks(blocks, passes(len(blocks), steps * recipe.accumulate, recipe.seed)),
            eval_dataset=None if held_out is None else Blocks(held_out),
            callbacks=[loop.OwnSettings()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if self.anchor is not None:
            trainer.add_callback(AnchorCallback(self.anchor, strength=recipe.strength, decoupled=recipe.decoupled))
        if best is not None:
            trainer.add_callback(best)
        if progress is not None:
            trainer.add_callback(loop.Progress(progress))

        def keep(step: int) -> None:
            self.write(self.kept[step], step, trainer.state.log_history, overwrite=overwrite)

        trainer.add_callback(loop.Keep(self.kept, keep))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1]))
        history: list[dict[str, Any]] = trainer.state.log_history
        step: int = trainer.state.global_step
        if best is not None:
            if loop.validations(history)[-1][0] != step:
                trainer.evaluate()  # it went on from its last step, after which an earlier run went on, unmeasured
                history = trainer.state.log_history
            step = loop.best_step(history) or step
            best.load(self.model, step)
        return step, history

    def write(self, out: Path, step: int, history: list[dict[str, Any]], *, overwrite: bool) -> RepairReport:
        """Write the model as it is now."""
        loop.check_finite(self.model, step)
        report = self._report(step, history)
        trained = stored_tensors(self.model, self.reader)

        def replaced(name: str, tensor: Tensor) -> Tensor:
            return trained[name].detach().to(tensor.dtype) if name in trained else tensor

        with output_folder(out, self.reader.folder, overwrite=overwrite, flushed=self.reader.shards) as staging:
            write_transformed(self.reader, staging, replaced)
            (staging / MANIFEST_FILE).unlink(missing_ok=True)  # of a model that was guarded: its weights are gone
            report.write(staging)
        return report

    def _distance(self) -> float | None:
        return None if self.anchor is None else self.anchor.distance(self.model)

    def _report(self, step: int, history: list[dict[str, Any]]) -> RepairReport:
        losses = [entry for entry in history if "loss" in entry]
        return RepairReport(
            model=self.name,
            revision=self.revision,
            anchor=self.anchor_name,
            anchor_revision=self.anchor_revision,
            recipe=self.recipe,
            steps_done=step,
            steps_trained=max(entry["step"] for entry in history),
            losses=tuple(
                Loss(step=entry["step"], loss=entry["loss"], anchor_distance=entry.get("anchor_distance"))
                for entry in losses
            ),
            validation=tuple(
                Validation(step=at, perplexity=perplexity_of(loss)) for at, loss in loop.validations(history)
            ),
            anchor_distance_before=self.distance_before,
            anchor_distance_after=self._distance(),
            seconds=time.monotonic() - self.started,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )


def _kept(final: Path, steps: Sequence[int], last: int) -> dict[int, Path]:
    """Where the weights on the way are written to, by step."""
    for step in steps:
        if not 0 < step <= last:
            raise RepairError(f"the weights after step {step} are to be kept, but steps are 1 to {last}")
    return {step: final.with_name(f"{final.name}-{step}") for step in steps}


def _digest(blocks: Tensor) -> str:
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]


def _check_steps(work: Workspace, steps: int, kept: Mapping[int, Path]) -> None:
    if work.checkpoint is None:
        return
    done = work.checkpoint[0]
    again = "begin again without --resume and with --overwrite"
    if done > steps:
        raise RepairError(
            f"the checkpoint in {work.folder} is of step {done} already, beyond the {steps} steps asked for; give "
            f"more, or {again}"
        )
    for step, folder in kept.items():
        if step <= done and not (folder / REPAIR_FILE).is_file():
            raise RepairError(
                f"the weights after step {step} are to be kept, and were not: the checkpoint in {work.folder} is of "
                f"step {done} already; leave that step out, or {again}"
            )


def _needed(repair: _Repair, *, validated: bool) -> int:
    """Bytes on the disk: what is written, two checkpoints while one takes the other's place, and two best weights."""
    n_weights: int = sum(parameter.numel() for parameter in repair.model.parameters())
    per_weight = 2 * _BYTES_PER_WEIGHT * bool(repair.recipe.checkpoint_every) + 2 * 4 * validated
    return repair.reader.n_bytes * (1 + len(repair.kept)) + per_weight * n_weights


def _advice(work: Workspace, error: loop.Diverged) -> str:
    last = work.checkpoint
    if last is None:
        return "nothing was written; try a lower learning rate or strength"
    step = last[0]
    if step == error.weights_of:
        # It has these very weights, so whoever goes on from it comes here again.
        return (
            f"nothing was written, and the checkpoint of step {step} in {work.folder} is as bad: begin anew with "
            "--overwrite and a lower learning rate or strength"
        )
    return (
        f"nothing was written, and the checkpoint of step {step} lies in {work.folder}: go on from it with --resume "
        "and a lower learning rate or strength; where that ends like this, begin anew with --overwrite"
    )


def _writing_problem(error: BaseException) -> str | None:
    """What to say of an error that writing a checkpoint met; ``None`` if it is another one."""
    message = str(error)
    # safetensors reports the system's error as text, and torch.save only that its archive was cut off.
    full = "No space left on device" in message or "inline_container" in message
    if full or getattr(error, "errno", None) == errno.ENOSPC:
        return "no space left on the disk; free some and go on with --resume, or name a folder on another disk"
    if isinstance(error, (OSError, SafetensorError)):
        return f"a checkpoint cannot be written: {getattr(error, 'strerror', None) or message}"
    return None
