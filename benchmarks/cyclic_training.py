"""Does cyclic precision training help low widths? A small GPT-2, trained on from the same start in several ways.

Every way has the same steps on the same questions in the same order; then new questions are answered at each width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, argument_parser, print_table, write
from peft import LoraConfig
from tiny_gpt2 import tiny_gpt2, training_batch, validation_passages
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.generated_squad import generated_passages
from optimum_qguard.evaluate.squad import Passage, SquadScore, squad
from optimum_qguard.precision.adapters import WidthAdapters
from optimum_qguard.precision.cyclic import CyclicPrecisionCallback
from optimum_qguard.precision.fake_quantization import FakeQuantization
from optimum_qguard.precision.joint import JointPrecisionTrainer

STEPS, BATCH, LEARNING_RATE, ADAPTER_LEARNING_RATE = 240, 32, 5e-4, 2e-3
WIDTHS = (8, 6, 4, 3)
MINIMUM, MAXIMUM, CYCLES = 3, 8, 8
START = "before"


@dataclass(frozen=True)
class Way:
    """How a model is trained on.

    Attributes:
        callback: options of `CyclicPrecisionCallback`, or ``None`` without it.
        joint: options of `JointPrecisionTrainer`, or ``None`` for the plain one.
        adapters: widths that have an adapter each; one serves all widths; none, and all weights are trained.
    """

    callback: Mapping[str, Any] | None = None
    joint: Mapping[str, Any] | None = None
    adapters: tuple[int, ...] = ()


_CYCLIC = {"minimum": MINIMUM, "maximum": MAXIMUM, "cycles": CYCLES}
_EACH = tuple(range(MINIMUM, MAXIMUM + 1))
CYCLIC = "cyclic, cosine"
WAYS: Mapping[str, Way] = {
    "full precision": Way(),
    "static, 8 bits": Way({"minimum": 8, "maximum": 8, "cycles": 1}),
    "static, 4 bits": Way({"minimum": 4, "maximum": 4, "cycles": 1}),
    CYCLIC: Way(_CYCLIC),
    "cyclic, linear": Way({**_CYCLIC, "schedule": "linear"}),
    "cyclic, triangular": Way({**_CYCLIC, "schedule": "triangular"}),
    "joint": Way(joint={"widths": WIDTHS}),
    "joint and consistency": Way(joint={"widths": WIDTHS, "consistency": 1.0}),
    "adapter, 8 bits": Way({"minimum": 8, "maximum": 8, "cycles": 1}, adapters=(8,)),
    "adapter, cyclic": Way(_CYCLIC, adapters=(8,)),
    "adapter a width, cyclic": Way(_CYCLIC, adapters=_EACH),
    "adapter a width, joint": Way(joint={"widths": WIDTHS}, adapters=WIDTHS),
}


@dataclass
class Trained:
    """A model and what is needed to answer at a width."""

    model: Any
    adapters: WidthAdapters | None = None
    layers: FakeQuantization = field(init=False)

    def __post_init__(self) -> None:
        self.layers = FakeQuantization(self.model)

    def score(self, tokenizer: Any, passages: Sequence[Passage], bits: int | None) -> SquadScore:
        """At full precision the adapter of the highest width is on."""
        if self.adapters is not None and len(self.adapters.widths) > 1:
            self.adapters.switch(bits or MAXIMUM)
        with self.layers.at(bits):
            return squad(self.model, tokenizer, passages, max_new_tokens=12, batch_size=100)


def cyclic_gpt2() -> Path:
    """Folder of the model trained by `CYCLIC` with seed 0, with its tokenizer."""
    return made_once(cache_folder() / "tiny-gpt2-squad-cyclic", _save_cyclic)


def _save_cyclic(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2())
    train(CYCLIC, 0, tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(name: str, seed: int, tokenizer: Any) -> Trained:
    """The small GPT-2, trained on in one of the `WAYS`; the seed chooses the questions."""
    way = WAYS[name]
    torch.manual_seed(seed)
    model = _start()
    adapters = None
    if way.adapters:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        adapters = WidthAdapters(model, way.adapters, config)
        model = adapters.model
    switched = adapters if len(way.adapters) > 1 else None
    folder = tempfile.mkdtemp()
    try:
        trainer = _trainer(way, switched)(
            model,
            _arguments(folder, ADAPTER_LEARNING_RATE if adapters else LEARNING_RATE),
            train_dataset=generated_passages(STEPS * BATCH, seed=10**8 + seed, split="train"),
            data_collator=partial(training_batch, tokenizer),
        )
        if way.callback is not None:
            trainer.add_callback(CyclicPrecisionCallback(**way.callback, adapters=switched))
        trainer.train()
    finally:
        shutil.rmtree(folder)
    return Trained(model, adapters)


def _start() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2())


def _trainer(way: Way, adapters: WidthAdapters | None) -> Callable[..., Trainer]:
    return Trainer if way.joint is None else partial(JointPrecisionTrainer, **way.joint, adapters=adapters)


def _arguments(folder: str, learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        warmup_steps=10,
        weight_decay=0.01,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train, ask, write and print."""
    parser = argument_parser(__doc__, RESULTS / "cyclic_training.json")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="of training")
    parser.add_argument("--seeds", type=int, default=2, help="questions to train on are drawn anew for each")
    parser.add_argument("--questions", type=int, default=500, help="to answer")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has already")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    set_verbosity_error()
    print_table(means(measure(arguments)))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each run, written as they come: every way with one seed before any with the next."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2())
    passages = validation_passages(arguments.questions)
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.resume and arguments.output.exists() else []
    rows = [row for row in rows if (row["steps"], row["questions"]) == (STEPS, arguments.questions)]
    done = {(row["way"], row["seed"]) for row in rows}
    runs = [(START, 0), *((way, seed) for seed in range(arguments.seeds) for way in arguments.ways)]
    for way, seed in tqdm([run for run in runs if run not in done], desc="Training", disable=None):
        begin = time.perf_counter()
        trained = Trained(_start()) if way == START else train(way, seed, tokenizer)
        seconds = time.perf_counter() - begin
        scores = {bits: trained.score(tokenizer, passages, bits) for bits in (None, *WIDTHS)}
        row: dict[str, Any] = {"way": way, "seed": seed, "steps": STEPS, "questions": arguments.questions}
        row |= {f"F1 at {bits or 'full'}": score.f1 for bits, score in scores.items()}
        row |= {f"EM at {bits or 'full'}": score.exact_match for bits, score in scores.items()}
        rows.append({**row, "training s": seconds})
        write("cyclic_training", rows, arguments.output)
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way: means over the seeds, F1 in percent."""
    by_way: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    columns = [column for column in rows[0] if column.startswith(("F1", "EM"))]
    return [
        {"way": way, "seeds": len(runs)}
        | {column: 100 * statistics.mean(run[column] for run in runs) for column in columns}
        for way, runs in by_way.items()
    ]


if __name__ == "__main__":
    main()
