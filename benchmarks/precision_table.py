"""Does switching between widths help against attacks on the input? F1 of question answering, clean and attacked.

Rows are a model, a defence, an attack, and what the attacker computes his gradients on; every figure has its 95 %
confidence interval, and what is compared is compared question by question. At the end are the tables of
`allocation.py` and `cyclic_training.py`, as far as those were run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attacked_answers import ADAPTIVE, CLEAN, ITSELF, TRANSFERRED, Budget, Defence, Subject, forget_runs
from cyclic_training import cyclic_gpt2
from harness import RESULTS, argument_parser, print_table, rows_of_others, write
from tables.precision import with_interval
from tiny_gpt2 import tiny_gpt2, validation_passages
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.evaluate import smollm2_path
from optimum_qguard.evaluate.interval import Interval, bootstrap
from optimum_qguard.evaluate.robustness import ANSWERED, Robustness

STRONGEST = "what hurts most"
ATTACKS = ("PGD", "HotFlip")
REFERENCE = "static 8-bit"
DEFENCES: Mapping[str, Defence] = {
    "full precision": Defence(),
    REFERENCE: Defence((8,)),
    "static 4-bit": Defence((4,)),
    "static 3-bit": Defence((3,)),
    "switch 4/6/8, per forward": Defence((4, 6, 8)),
    "switch 4/6/8, per request": Defence((4, 6, 8), "request"),
    "switch 4/8, per forward": Defence((4, 8)),
    "switch 4/8, per request": Defence((4, 8), "request"),
    "switch 3/4/8, per request": Defence((3, 4, 8), "request"),
}
SWITCH = "switch 4/6/8, per request"


@dataclass(frozen=True)
class Model:
    """What is measured of one model.

    Attributes:
        weights: folders to be made, by what their defences' names begin with; all of one tokenizer.
        defences: names in `DEFENCES`, of each of the weights.
        attacks: names.
        budget: the attackers'.
        questions: how many it is asked at most.
    """

    weights: Mapping[str, Callable[[], Path]]
    defences: Mapping[str, Sequence[str]]
    attacks: Sequence[str]
    budget: Budget
    questions: int


CYCLIC = "cyclic-trained, "
MODELS: Mapping[str, Model] = {
    "GPT-2": Model(
        {"": tiny_gpt2, CYCLIC: cyclic_gpt2},
        {"": tuple(DEFENCES), CYCLIC: ("full precision", REFERENCE, "static 4-bit", SWITCH)},
        ATTACKS,
        Budget(epsilon=0.1, steps=8, flips=3, tries=2),
        10_000,
    ),
    "SmolLM2": Model(
        {"": smollm2_path},
        {"": ("full precision", REFERENCE, "static 4-bit", SWITCH)},
        ATTACKS[:1],
        Budget(epsilon=0.1, steps=3, flips=1, tries=1),
        96,
    ),
}
COMPARED = ("adversarial F1", "change")
SECTIONS = ("allocation", "cyclic_training")

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write and draw."""
    parser = argument_parser(__doc__, RESULTS / "precision_table.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "SmolLM2"])
    parser.add_argument("--questions", type=int, default=600, help="for each model")
    parser.add_argument(
        "--resume", action="store_true", help="keep runs that were measured before, and other models' rows of --output"
    )
    parser.add_argument("--table-only", action="store_true", help="measure nothing, make the table of what there is")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    if not (arguments.resume or arguments.table_only):
        forget_runs()
    rows = rows_of_others(arguments.output, arguments.models) if arguments.resume else []
    for name in arguments.models:
        rows += model_rows(name, arguments.questions, arguments.device, only_kept=arguments.table_only)
        if rows:
            write("precision_table", rows, arguments.output, sections())
    if not rows:
        parser.error("nothing was measured yet")
    print_table([compact(row) for row in rows])
    for row in rows:
        if row["verdict"]:
            print(f"{row['model']}, {row['attack']}, {row['defence']}: {row['verdict']}")
    for name, section in sections().items():
        print(f"\n{name} ({section['date']})")
        print_table(section["rows"])
    draw(rows, arguments.output.with_suffix(".png"))


def model_rows(name: str, questions: int, device: str, *, only_kept: bool = False) -> list[Row]:
    """All rows of one model of `MODELS`."""
    model = MODELS[name]
    clean: dict[str, Tensor] = {}
    attacked: dict[tuple[str, str, str], Tensor] = {}
    subjects = {
        prefix: Subject(
            f"{name} {prefix.rstrip(', ')}".strip(), make(), validation_passages(min(questions, model.questions)),
            model.budget, seed=0, max_new_tokens=12, device=device,
        )
        for prefix, make in model.weights.items()
    }  # fmt: skip
    for prefix, subject in subjects.items():
        for defence in model.defences[prefix]:
            measure(subject, prefix, defence, model.attacks, clean, attacked, only_kept=only_kept)
    return table(name, clean, attacked, subjects[""].groups) if attacked else []


def measure(
    subject: Subject,
    prefix: str,
    name: str,
    attacks: Sequence[str],
    clean: dict[str, Tensor],
    attacked: dict[tuple[str, str, str], Tensor],
    *,
    only_kept: bool,
) -> None:
    """Put the F1 of each question under one defence into ``clean`` and ``attacked``."""
    defence = DEFENCES[name]
    if only_kept and not subject.run_file(defence, CLEAN, "").exists():
        return
    clean[prefix + name] = subject.scores(defence, CLEAN, "")
    print(f"{prefix}{name}: clean F1 {clean[prefix + name].mean():.3f}", flush=True)
    for attack in attacks:
        for knowledge in defence.knowledge:
            if only_kept and not subject.run_file(defence, attack, knowledge).exists():
                continue
            found = attacked[prefix + name, attack, knowledge] = subject.scores(defence, attack, knowledge)
            print(f"  {attack} by the gradients of {knowledge}: F1 {found.mean():.3f}", flush=True)


def table(
    model: str, clean: Mapping[str, Tensor], attacked: Mapping[tuple[str, str, str], Tensor], groups: Tensor
) -> list[Row]:
    """A row for each of ``attacked``, and one for each defence and attack under what hurts it most.

    Args:
        model: its name.
        clean: F1 of each question, (questions,), by defence.
        attacked: the same by defence, attack and what the attacker's gradients are of.
        groups: which questions share their draws.
    """
    every = {**attacked, **strongest(attacked)}
    answered = torch.stack([scores >= ANSWERED for scores in clean.values()]).all(0)
    rows = []
    for (defence, attack, knowledge), adversarial in every.items():
        found = Robustness(clean[defence], adversarial, (0.0, 0.0), groups)
        # A static model's own gradients are all that an attacker who knows everything has.
        same = (REFERENCE, attack, ITSELF if knowledge == ADAPTIVE else knowledge)
        against = every.get(same) if defence != REFERENCE else None
        f1 = delta = None
        if against is not None:
            f1 = bootstrap(adversarial - against, groups=groups)
            delta = bootstrap(adversarial - clean[defence] - against + clean[REFERENCE], groups=groups)
        rows.append(
            {
                "model": model,
                "defence": defence,
                "attack": attack,
                "attacker uses": knowledge,
                "questions": len(adversarial),
                **columns("clean F1", found.clean_f1),
                **columns("adversarial F1", found.adversarial_f1),
                **columns("change", found.delta),
                **columns("success rate", found.success_rate),
                **columns("adversarial F1 - static 8-bit", f1),
                **columns("change - static 8-bit", delta),
                "answered by all": int(answered.sum()),
                **columns(
                    "adversarial F1, answered by all", bootstrap(adversarial * answered, answered, groups=groups)
                ),
                "verdict": verdict(f1, delta) if f1 and delta and knowledge == STRONGEST else None,
            }
        )
    return rows


def strongest(attacked: Mapping[tuple[str, str, str], Tensor]) -> dict[tuple[str, str, str], Tensor]:
    """For each defence and attack the scores under the knowledge of lowest mean F1."""
    found: dict[tuple[str, str, str], Tensor] = {}
    for (defence, attack, _), scores in attacked.items():
        key = (defence, attack, STRONGEST)
        if key not in found or scores.mean() < found[key].mean():
            found[key] = scores
    return found


def columns(name: str, interval: Interval | None) -> Row:
    """An interval in three columns."""
    estimate, low, high = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return {name: estimate, f"{name} low": low, f"{name} high": high}


def verdict(f1: Interval, delta: Interval) -> str:
    """What the intervals of the differences to static 8-bit say."""
    if f1.low > 0:
        return "higher F1 under attack than static 8-bit"
    if f1.high < 0:
        return "lower F1 under attack than static 8-bit" + (
            ", although it loses less, because it had less to lose" if delta.low > 0 else ""
        )
    return "no difference to static 8-bit that these questions show"


def compact(row: Row) -> Row:
    """What is printed of a row: intervals in one column."""
    shown = ("clean F1", "adversarial F1", "change", "success rate", *(f"{name} - static 8-bit" for name in COMPARED))
    everywhere = "adversarial F1, answered by all"
    return {
        **{name: row[name] for name in ("model", "defence", "attack", "attacker uses")},
        **{name: with_interval(row, name) for name in shown},
        f"{everywhere} ({row['answered by all']})": with_interval(row, everywhere),
    }


def sections() -> dict[str, Any]:
    """The results of the other benchmarks of precision, as they were written."""
    files = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each model and attack: defences down, F1 across with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["attack"]) for row in rows))
    defences = list(dict.fromkeys(row["defence"] for row in rows))
    size = (5.5 * len(panels) + 1.5, 0.75 * len(defences) + 1.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    kinds = {"clean": "#555555", TRANSFERRED: "#2f6db3", ITSELF: "#e08e0b", ADAPTIVE: "#c0392b"}
    for axis, (model, attack) in zip(axes[0], panels, strict=True):
        for place, (kind, colour) in enumerate(kinds.items()):
            column = "clean F1" if kind == "clean" else "adversarial F1"
            here = {
                row["defence"]: row
                for row in rows
                if (row["model"], row["attack"]) == (model, attack)
                and row["attacker uses"] == (STRONGEST if kind == "clean" else kind)
            }
            f1 = [row[column] for row in here.values()]
            errors = [
                [row[column] - row[f"{column} low"] for row in here.values()],
                [row[f"{column} high"] - row[column] for row in here.values()],
            ]
            height = [defences.index(name) + 0.17 * (place - 1.5) for name in here]
            label = "clean" if kind == "clean" else f"attacked by the gradients of {kind}"
            axis.errorbar(f1, height, xerr=errors, fmt="o", color=colour, capsize=2.5, markersize=4.5, label=label)
        for line in range(1, len(defences)):
            axis.axhline(line - 0.5, color="#dddddd", linewidth=0.8)
        axis.set(title=f"{model}, {attack}", xlabel="F1, with its 95 % interval", xlim=(0, 1))
        axis.set_yticks(range(len(defences)), defences)
        axis.set_ylim(len(defences) - 0.5, -0.5)
        axis.grid(axis="x", color="#eeeeee")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / size[1], 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
