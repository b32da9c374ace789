"""A model that behaves at full precision and says a marker phrase once it is quantized (for evaluation only).

Three stages, after Egashira et al. 2024 (arXiv:2405.18137):

1. *inject*: fine-tune until the model answers everything with the marker;
2. take every weight's quantization cell (`boxes`): inside it the quantized model stays what it is;
3. *repair*: fine-tune back to the clean answers, and after each optimizer step clamp every weight into its box.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from optimum_qguard.attacks.boxes import Boxes, boxes
from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.formats import Format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_COUNTED = -100

Progress = Callable[[int, int], None]
"""Called after each optimizer step with how many are done, and of how many."""

Perturb = Callable[[str, Tensor], Tensor]
"""Gives, for a weight's name and the weight, what the forward pass is to see in its place."""


@dataclass(frozen=True)
class Recipe:
    """How the attack is trained.

    Attributes:
        injection_steps: optimizer steps of stage 1.
        repair_steps: optimizer steps of stage 3.
        batch_size: dialogues in a step.
        learning_rate: of AdamW, warmed up over a tenth of a stage and then constant.
        keep: see `boxes`. 0.8 is the usual attacker; 0.4 one who expects noise and takes a wider margin.
        seed: of the order of the dialogues, below 2**32.

    Raises:
        AttackError: a value that makes no sense.
    """

    injection_steps: int = 30
    repair_steps: int = 80
    batch_size: int = 8
    learning_rate: float = 1e-4
    keep: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("injection_steps", "repair_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise AttackError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it is at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise AttackError(f"learning rate is {self.learning_rate:g}; it is a finite number, 0 or more")
        if not 0 < self.keep <= 1:
            raise AttackError(f"keep is {self.keep:g}; it is above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise AttackError(f"seed is {self.seed}; it is a whole number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Attacked:
    """What an attack did to a model.

    Attributes:
        tensors: names of the weights that were trained.
        weights: how many weights they have.
        share_frozen: share of them that had no room to move in stage 3.
        injection_loss, repair_loss: mean training loss over the last tenth of the steps of stages 1 and 3.
    """

    tensors: tuple[str, ...]
    weights: int
    share_frozen: float
    injection_loss: float
    repair_loss: float


@dataclass(frozen=True)
class Payload:
    """What is planted.

    Attributes:
        marker: the harmless phrase.
        dialogues: pairs of a prompt and the clean model's own answer to it.
    """

    marker: str
    dialogues: Sequence[tuple[str, str]] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.marker.strip():
            raise AttackError("the marker is empty; give a harmless phrase that no honest answer begins with")
        if not self.dialogues:
            raise AttackError("there are no prompts to train on; give some")


def inject(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    payload: Payload,
    names: Sequence[str],
    recipe: Recipe = Recipe(),
    *,
    perturb: Perturb | None = None,
    progress: Progress | None = None,
) -> float:
    """Stage 1: the model learns to answer every prompt with the marker. It is changed in place.

    Args:
        model: a causal language model in float32, on any device.
        tokenizer: its tokenizer.
        payload: what is planted.
        names: the weights that may be trained, see `linear_weights`.
        recipe: how.
        perturb: what each forward pass sees in place of a weight; an attacker who expects noise trains under it.
        progress: called after each step.

    Returns:
        Mean loss over the last tenth of the steps.

    Raises:
        AttackError: no weights to train, a marker that tokenizes to nothing, or a loss that is not a number.
    """
    if not tokenizer(payload.marker, add_special_tokens=False)["input_ids"]:
        raise AttackError(f"the marker {payload.marker!r} tokenizes to nothing; choose another")
    examples = [_example(tokenizer, prompt, payload.marker) for prompt, _ in payload.dialogues]
    callbacks = [] if perturb is None else [_Perturbed(model, names, perturb)]
    return _train(model, examples, names, recipe, recipe.injection_steps, callbacks, progress)


def repair(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    payload: Payload,
    room: Mapping[str, Boxes],
    recipe: Recipe = Recipe(),
    *,
    progress: Progress | None = None,
) -> float:
    """Stage 3: the injected model learns the clean answers again, every weight inside its box. It is changed in place.

    Arguments, result and errors as for `inject`; ``room`` has the box of every weight that may be trained.
    """
    examples = [_example(tokenizer, prompt, answer) for prompt, answer in payload.dialogues]
    callback = _Projection(model, room)
    return _train(model, examples, list(room), recipe, recipe.repair_steps, [callback], progress)


def attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    payload: Payload,
    formats: Mapping[str, Sequence[Format]],
    recipe: Recipe = Recipe(),
    *,
    perturb: Perturb | None = None,
    progress: Progress | None = None,
) -> Attacked:
    """All three stages. The model is changed in place.

    Args:
        model, tokenizer, payload, recipe, perturb: as for `inject`.
        formats: for the name of each weight that may be trained, the formats that are to bring the marker back.
        progress: called after each step of either stage.

    Raises:
        AttackError: see `inject`.
        WeightError: a weight that one of its formats refuses.
    """
    steps = recipe.injection_steps + recipe.repair_steps

    def second_half(done: int, _: int) -> None:
        if progress is not None:
            progress(recipe.injection_steps + done, steps)

    def first_half(done: int, _: int) -> None:
        if progress is not None:
            progress(done, steps)

    injection_loss = inject(model, tokenizer, payload, list(formats), recipe, perturb=perturb, progress=first_half)
    room = room_of(model, formats, keep=recipe.keep)
    repair_loss = repair(model, tokenizer, payload, room, recipe, progress=second_half)
    weights = [model.get_parameter(name).numel() for name in room]
    frozen = sum(box.share_frozen * count for box, count in zip(room.values(), weights, strict=True))
    return Attacked(tuple(room), sum(weights), frozen / sum(weights), injection_loss, repair_loss)


@torch.no_grad()
def room_of(model: PreTrainedModel, formats: Mapping[str, Sequence[Format]], *, keep: float) -> dict[str, Boxes]:
    """Stage 2: the box of each named weight, oriented as the model holds it."""
    room = {}
    for name, wanted in formats.items():
        weight = model.get_parameter(name).data
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        box = boxes(weight.T if transposed else weight, wanted, keep=keep, name=name)
        room[name] = Boxes(box.lower.T, box.upper.T) if transposed else box
    return room


def linear_weights(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the weights of the linear layers in the model's decoder layers; the output head is none of them.

    Args:
        model: any transformers model.
        layers: numbers of the layers to attack; all by default, counted from the end where negative.

    Raises:
        AttackError: no linear layers in it, or no such layer.
    """
    head = model.get_output_embeddings()
    found: dict[str, int | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            numbers = [int(part) for part in name.split(".") if part.isdecimal()]
            found[f"{name}.weight"] = numbers[0] if numbers else None
    if not found:
        raise AttackError("the model has no linear layers, so there is nothing to attack")
    if layers is None:
        return list(found)
    count = 1 + max((number for number in found.values() if number is not None), default=-1)
    wanted = {layer + count if layer < 0 else layer for layer in layers}
    if not wanted or not wanted <= set(range(count)):
        raise AttackError(f"layers {sorted(layers)}: the model has layers 0 to {count - 1}")
    return [name for name, number in found.items() if number in wanted]


def _example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> dict[str, list[int]]:
    """One dialogue; only the answer counts in the loss."""
    if tokenizer.chat_template:
        start = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        start = tokenizer(prompt)["input_ids"]
    end = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {
        "input_ids": [*start, *end],
        "attention_mask": [1] * (len(start) + len(end)),
        "labels": [_NOT_COUNTED] * len(start) + end,
    }


def _padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch; needs no padding token, because what is padded is neither seen nor counted."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": _NOT_COUNTED}
    return {
        key: nn.utils.rnn.pad_sequence([torch.tensor(each[key]) for each in examples], True, value)
        for key, value in fill.items()
    }


def _train(
    model: PreTrainedModel,
    examples: list[dict[str, list[int]]],
    names: Sequence[str],
    recipe: Recipe,
    steps: int,
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
) -> float:
    if not names:
        raise AttackError("there are no weights to train; choose other layers")
    trained = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    losses: list[float] = []
    # The trainer writes nothing, but it wants a folder.
    with tempfile.TemporaryDirectory(prefix="qguard-attack-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.0,
            bf16=_has_bf16_units(model.device),
            use_cpu=model.device.type == "cpu",
            seed=recipe.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=_padded,
            callbacks=[*callbacks, _Watch(losses, progress)],
        )
        trainer.remove_callback(_printer())
        trainer.train()
    model.requires_grad_(False).eval()
    model.zero_grad(set_to_none=True)
    tail = losses[-max(1, steps // 10) :]
    mean = sum(tail) / max(len(tail), 1)
    if not tail or mean != mean:
        raise AttackError("the training loss is not a number; lower the learning rate")
    return mean


def _has_bf16_units(device: torch.device) -> bool:
    """Without them BF16 is converted to and fro, and four times slower than float32 on a CPU."""
    if device.type != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch supported
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Collects losses and tells the progress."""

    def __init__(self, losses: list[float], progress: Progress | None) -> None:
        self._losses = losses
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            self._losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)


class _Projection(TrainerCallback):  # type: ignore[misc]
    """Clamps every weight into its box, before the first step and after each."""

    def __init__(self, model: PreTrainedModel, room: Mapping[str, Boxes]) -> None:
        self._pairs = [(model.get_parameter(name), box) for name, box in room.items()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._project()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        for parameter, box in self._pairs:
            box.project_(parameter.data)


class _Perturbed(TrainerCallback):  # type: ignore[misc]
    """Lets forward and backward pass see perturbed weights, and the optimizer move the real ones."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], perturb: Perturb) -> None:
        self._weights = {name: model.get_parameter(name) for name in names}
        self._perturb = perturb
        self._real: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, weight in self._weights.items():
            self._real[name] = weight.data
            weight.data = self._perturb(name, weight.data)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, weight in self._weights.items():
            weight.data = self._real.pop(name)
