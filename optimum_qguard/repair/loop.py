"""The training of a repair: a transformers ``Trainer`` that stops at the first loss that is no number, and what it does
between its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from optimum_qguard.repair.recipe import Recipe

_WEIGHTS_FILE = "model.safetensors"
_LOGGED_EVERY = 10


class Diverged(Exception):
    """Training went wrong.

    Args:
        step: at which step.
        problem: how.
        weights_of: the step whose weights show it.
    """

    def __init__(self, step: int, problem: str, *, weights_of: int) -> None:
        super().__init__(f"step {step}: {problem}")
        self.weights_of = weights_of


def training_arguments(
    recipe: Recipe, folder: Path, *, steps: int, validated: bool, resumed: bool, device: str | None
) -> TrainingArguments:
    """A recipe as the `Trainer` takes it.

    Args:
        folder: for checkpoints.
        steps: how many to train, which may be fewer than the recipe's.
        validated: whether there is a validation text.
        resumed: whether the run goes on from a checkpoint.
        device: ``"cpu"``, or ``None`` for an accelerator if there is one.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.accumulate,
        train_sampling_strategy="sequential",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        logging_first_step=True,
        logging_steps=_LOGGED_EVERY,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validated else "no",
        eval_steps=recipe.evaluate_every,
        eval_on_start=validated and not resumed,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.checkpoint_every else "no",
        save_steps=recipe.checkpoint_every or steps,
        save_total_limit=1,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu" and torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the trainer would make batches as many times larger
    return arguments


class RepairTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` whose checkpoints hold the weights under the model's own names, all of them finite."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            step = self.state.global_step
            raise Diverged(step + 1, f"the loss is {float(loss)}", weights_of=step)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what ``load_state_dict`` takes, which ``save_pretrained`` does not for models that transformers converts
        while loading."""
        check_finite(self.model, self.state.global_step)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / _WEIGHTS_FILE))


def check_finite(model: Any, step: int) -> None:
    """Raise `Diverged` if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise Diverged(step, f"{name} is not finite any more", weights_of=step)


class OwnSettings(TrainerCallback):  # type: ignore[misc]
    """The learning rate of this run, and how often it measures and saves, in place of those of the checkpoint it goes
    on from."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        state.eval_steps, state.save_steps = args.eval_steps, args.save_steps
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if all(rate == args.learning_rate for rate in scheduler.base_lrs):
            return
        scheduler.base_lrs = [args.learning_rate] * len(scheduler.base_lrs)
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * factor(scheduler.last_epoch)


class Progress(TrainerCallback):  # type: ignore[misc]
    """Tells how many steps are done, and of how many."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)


class Keep(TrainerCallback):  # type: ignore[misc]
    """Has some steps logged, those of measurements and the last one too, and calls ``keep(step)`` after each of the
    first. To be the last callback."""

    def __init__(self, steps: Collection[int], keep: Callable[[int], None]) -> None:
        self._steps = set(steps)
        self._keep = keep

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._steps or control.should_evaluate or state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._steps:
            self._steps.remove(state.global_step)
            self._keep(state.global_step)


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights with the lowest validation loss, and ends training when that no longer falls.

    What is best is read from the log, which checkpoints carry. The best weights at the last checkpoint stay on the disk
    until the next one is complete, so that a run can go on from it.

    Args:
        folder: for the weights.
        patience: end after so many measurements without a new best; ``None``: never.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self._folder = folder
        self._patience = patience
        self._at_checkpoint: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_checkpoint = best_step(state.log_history)
        self._delete_others(self._at_checkpoint)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, loss = validations(state.log_history)[-1]
        if not math.isfinite(loss):
            raise Diverged(step, f"the validation loss is {loss}", weights_of=step)
        if step == 0:
            return
        if best_step(state.log_history) == step:
            partial = self._folder / "best.partial"
            save_model(model, str(partial))
            partial.replace(self._path(step))
            self._delete_others(step, self._at_checkpoint)
        elif exhausted(state.log_history, self._patience):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_checkpoint = best_step(state.log_history)
        self._delete_others(self._at_checkpoint)

    def load(self, model: Any, step: int) -> None:
        """Put the weights of the best step into the model."""
        load_model(model, str(self._path(step)))

    def _path(self, step: int) -> Path:
        return self._folder / f"best-{step}.safetensors"

    def _delete_others(self, *steps: int | None) -> None:
        kept = [self._path(step) for step in steps if step is not None]
        for path in self._folder.glob("best-*.safetensors"):
            if path not in kept:
                path.unlink()


def validations(history: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Steps and validation losses in a trainer's log."""
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def best_step(history: Iterable[Mapping[str, Any]]) -> int | None:
    """The step with the lowest validation loss, the first of several; the input (step 0) does not count."""
    return min(((loss, step) for step, loss in validations(history) if step > 0), default=(None, None))[1]


def exhausted(history: Iterable[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether there were ``patience`` measurements since the best one."""
    history = list(history)
    best = best_step(history)
    if patience is None or best is None:
        return False
    return sum(step > best for step, _ in validations(history)) >= patience
