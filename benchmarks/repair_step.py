"""What an anchor costs in each training step, in time and memory; the same for the paper's way of holding weights.

All of it is training by transformers' ``Trainer`` as `qguard repair` sets it up: float32 weights, and on CUDA passes in
bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import RESULTS, Peak, Timings, argument_parser, peak_memory, print_table, write
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.repair.anchor import AnchorCallback
from optimum_qguard.repair.blocks import Blocks, passes, token_blocks
from optimum_qguard.repair.modules import anchored_layers
from optimum_qguard.repair.recipe import Recipe

WITHOUT, COUPLED, DECOUPLED, PAPER = "without", "coupled", "decoupled", "the paper's way"
SIDES = (WITHOUT, COUPLED, DECOUPLED, PAPER)
PAPER_STRENGTH = 1e-5
MEMORY_STEPS = 2


class Paper:
    """The paper's anchor: a second state dict in memory, and a penalty on detached weights, which has no gradient."""

    def __init__(self, model: Any, anchor: Path) -> None:
        self._clean = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32).state_dict()
        self._names = list(anchored_layers(model))

    def penalty(self, model: Any) -> torch.Tensor:
        """The mean over the anchored tensors of the mean squared distance."""
        squares = [
            (model.get_parameter(name).detach().cpu().float() - self._clean[name]).pow(2).mean() for name in self._names
        ]
        return torch.stack(squares).mean()


class Turns(TrainerCallback):  # type: ignore[misc]
    """Holds the weights in another one of some ways in each step, and times the steps.

    Args:
        ways: of `SIDES`, in turn; every other round is in reverse.
        anchor: the clean checkpoint.
    """

    def __init__(self, ways: tuple[str, ...], anchor: Path) -> None:
        self._ways = ways
        self._anchor = anchor
        self.holding = {
            way: AnchorCallback(anchor, strength=Recipe().strength, decoupled=way == DECOUPLED, log=False)
            for way in ways
            if way in (COUPLED, DECOUPLED)
        }
        self.paper: Paper | None = None
        self.way = ways[0]
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.cpu_seconds: dict[str, list[float]] = {way: [] for way in ways}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        for callback in self.holding.values():
            callback.on_train_begin(args, state, control, model=model, **rest)
        if PAPER in self._ways:
            self.paper = Paper(model, self._anchor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        round_, turn = divmod(state.global_step, len(self._ways))
        self.way = self._ways[:: -1 if round_ % 2 else 1][turn]
        self._begin = _now(), time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.way in self.holding:
            self.holding[self.way].on_pre_optimizer_step(args, state, control, **rest)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.way in self.holding:
            self.holding[self.way].on_optimizer_step(args, state, control, **rest)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        begin, cpu_begin = self._begin
        self.seconds[self.way].append(_now() - begin)
        self.cpu_seconds[self.way].append(time.process_time() - cpu_begin)


class TurnsTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` that adds the paper's penalty to the loss when it is its turn."""

    def __init__(self, *arguments: Any, turns: Turns, **options: Any) -> None:
        super().__init__(*arguments, callbacks=[turns], **options)
        self._turns = turns

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **options)
        if self._turns.way == PAPER and self._turns.paper is not None:
            loss = loss + PAPER_STRENGTH * self._turns.paper.penalty(model)
        return loss


def train(
    ways: tuple[str, ...], block_size: int, steps: int, device: str, model: Path, anchor: Path
) -> tuple[Turns, Any]:
    """Train for ``steps`` steps in each of the ways, in turn; return the times and the model."""
    disable_progress_bar()
    set_verbosity_error()
    recipe = Recipe()
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    n_steps = steps * len(ways)
    n_examples = n_steps * recipe.accumulate
    text = standard_library_text(min(8 * n_examples * block_size, 500_000), "training")
    blocks = token_blocks(AutoTokenizer.from_pretrained(model), text, block_size)
    turns = Turns(ways, anchor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=n_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=recipe.accumulate,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=recipe.warmup_steps,
            weight_decay=0.0,
            bf16=device != "cpu",
            use_cpu=device == "cpu",
            dataloader_pin_memory=device != "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Blocks(blocks, passes(len(blocks), n_examples, recipe.seed))
        TurnsTrainer(model=trained, args=arguments, train_dataset=dataset, turns=turns).train()
    return turns, trained


def rows_of(block_size: int, arguments: argparse.Namespace, model: Path, anchor: Path) -> list[dict[str, Any]]:
    """A row for each side."""
    turns, trained = train(SIDES, block_size, arguments.steps + 1, arguments.device, model, anchor)
    # The first round warms up.
    timings = Timings({way: seconds[1:] for way, seconds in turns.seconds.items()})
    cpu = Timings({way: seconds[1:] for way, seconds in turns.cpu_seconds.items()})
    logging = {way: _measuring(callback, trained) for way, callback in turns.holding.items()}
    peaks: Mapping[str, Peak] = {
        way: peak_memory(partial(_train_alone, way, block_size, arguments.device, model, anchor), prepare=_imports)
        for way in tqdm(SIDES, desc="Peak memory", disable=None)
    }
    rows = []
    for way in SIDES:
        row: dict[str, Any] = {"model": "SmolLM2-135M", "block": f"{Recipe().accumulate} x {block_size}", "anchor": way}
        row |= {"steps": arguments.steps, "step s": timings.median(way), "time ratio": timings.ratio(way, WITHOUT)}
        row |= {"CPU s": cpu.median(way), "CPU ratio": cpu.ratio(way, WITHOUT), "log CPU s": logging.get(way)}
        for kind, attribute in (("", "cuda"),) if arguments.device == "cuda" else _KINDS:
            mine, plain = (getattr(peaks[each], attribute) for each in (way, WITHOUT))
            row |= {f"peak{kind} MB": mine / 1e6, f"peak{kind} ratio": mine / plain}
        rows.append(row)
    return rows


_KINDS = ((", anonymous", "anonymous"), ("", "rss"))


def _measuring(callback: AnchorCallback, model: Any) -> float:
    """CPU seconds in which loss and distance are measured for the log."""
    assert callback.anchor is not None
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        callback.anchor.measure(model)
        seconds.append(time.process_time() - begin)
    return median(seconds)


def _train_alone(way: str, block_size: int, device: str, model: Path, anchor: Path) -> None:
    train((way,), block_size, MEMORY_STEPS, device, model, anchor)


def _imports() -> None:
    """What training would import on its way."""
    import transformers.models.llama.modeling_llama  # noqa: F401


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure, write and print."""
    parser = argument_parser(__doc__, RESULTS / "repair_step.json")
    parser.add_argument("--block-size", type=int, nargs="+", default=[128, 512], metavar="N", help="tokens")
    parser.add_argument("--steps", type=int, default=5, help="timed for each side")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for block_size in arguments.block_size:
        rows += rows_of(block_size, arguments, smollm2_path(off_grid=True), smollm2_path())
        write("repair_step", rows, arguments.output)
    print_table(rows)


if __name__ == "__main__":
    main()
