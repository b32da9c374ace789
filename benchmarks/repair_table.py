"""Repair of models damaged by weight noise: the paper's tables, with an anchor that really pulls, and without any.

Every row is one model, one noise, one way to repair, a number of steps and a precision. Single runs are kept in the
cache folder, so that a script that was stopped goes on with ``--resume``. Rows come in the order of their importance.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damaged_models import PRECISIONS, SMOLLM2, Scale, adapted, distance, measure, noise_of, noised
from harness import RESULTS, argument_parser, write
from tables.repair import repair_table
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.evaluate.prompt_suite import suite_categories
from optimum_qguard.evaluate.recovery import PromptComparison, recovery
from optimum_qguard.evaluate.recovery_plots import plot_categories, plot_noise, plot_ordering, plot_variance
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.repair.run import repair_checkpoint

GUARDED_FOR = "int8-rowwise"


@dataclass(frozen=True)
class Method:
    """One way to repair.

    Attributes:
        anchor: ``"clean"``, ``"attacked"``, ``"guarded"`` (the attacked model after guard), or ``None``.
        at: after how many steps it is measured.
        options: of `repair_checkpoint`.
    """

    anchor: str | None
    at: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


NO_ANCHOR, DEFAULT = "no anchor", "default"
# The paper's own strengths with a gradient, which its penalty never had.
METHODS: Mapping[str, Method] = {
    NO_ANCHOR: Method(None, (50, 100, 250)),
    DEFAULT: Method("clean", (50, 100, 250)),
    "anchor: attacked, guarded": Method("guarded", (100,)),
    "anchor: attacked": Method("attacked", (100,)),
    "paper, attempt 1": Method("clean", (250,), {"strength": 1e-5, "decoupled": False}),
    "paper, attempt 2": Method("clean", (300,), {"strength": 5e-6, "decoupled": False}),
    "paper, attempt 3": Method("clean", (400,), {"strength": 2e-6, "decoupled": False}),
}
MAIN = 1.20
RATIOS = (MAIN, 1.10, 1.15)
SHORTENED = {NO_ANCHOR: (100,), DEFAULT: (100,)}  # what other noises than the first are repaired with


def main() -> None:
    """Measure, print, write and draw."""
    parser = argument_parser(__doc__, RESULTS / "repair_table.json")
    parser.add_argument("--models", nargs="+", default=[SMOLLM2], help="folders or Hub ids")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="perplexity by noise, as a multiple")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="of the noise and of the repair")
    parser.add_argument("--block-size", type=int, help="tokens of a sequence (128 on the CPU, on CUDA 2048)")
    parser.add_argument("--accumulate", type=int, help="sequences of a step (1 on the CPU, on CUDA 2)")
    parser.add_argument("--tokens", type=int, default=2560, help="of text that perplexity is measured on")
    parser.add_argument("--resume", action="store_true", help="keep the runs that there are")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, make the table of what there is")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.disable(logging.ERROR)
    on_cpu = arguments.device == "cpu"
    scale = Scale(
        block_size=arguments.block_size or (128 if on_cpu else 2048),
        accumulate=arguments.accumulate or (1 if on_cpu else 2),
        tokens=arguments.tokens,
        device=arguments.device,
    )
    run_all(arguments, scale)


def run_all(arguments: argparse.Namespace, scale: Scale) -> None:
    """Every run in turn; the file is written after each."""
    runs = Runs(cache_folder() / "repair-table", scale, fresh=not (arguments.resume or arguments.table_only))
    rows: list[dict[str, Any]] = []
    for model, ratio, seed, name in planned(arguments):
        if not arguments.table_only:
            runs.repair(model, ratio, seed, name)
        rows += runs.rows(model, ratio, seed, name)
        if rows:
            write("repair_table", rows, arguments.output)
    if not rows:
        raise SystemExit("nothing was measured yet; run without --table-only")
    print(repair_table(rows))
    draw(runs, rows, arguments.output)


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int, str]]:
    """Model, ratio, seed and method of each run: all methods on the first noise, then two of them on the others."""
    first_ratio, first_seed = arguments.ratios[0], arguments.seeds[0]
    noises = [(first_ratio, seed) for seed in arguments.seeds]
    noises += [(ratio, seed) for seed in arguments.seeds for ratio in arguments.ratios[1:]]
    for model in arguments.models:
        for ratio, seed in noises:
            for name in arguments.methods:
                if (ratio, seed) == (first_ratio, first_seed) or name in SHORTENED:
                    yield model, ratio, seed, name


class Runs:
    """What was measured, in a folder: one file for each model, those repaired so far among them.

    Args:
        folder: where.
        scale: how much is trained and measured, which is part of the files' names.
        fresh: forget what an earlier script measured.
    """

    def __init__(self, folder: Path, scale: Scale, *, fresh: bool) -> None:
        self._scale = scale
        self._folder = folder / f"{scale.trained}-{scale.measured}"
        if fresh:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def repair(self, model: str, ratio: float, seed: int, name: str) -> None:
        """Repair one model in one way and measure it after each number of steps, unless that was done."""
        method, at = METHODS[name], self._steps(ratio, seed, name)
        if all(self._file(model, ratio, seed, name, steps).exists() for steps in at):
            return
        clean, attacked = adapted(model, self._scale), noised(model, self._scale, ratio, seed)
        self._measure(self._file(model, "clean"), clean)
        noise = noise_of(attacked)
        self._measure(self._file(model, ratio, seed), attacked, noise=noise, distance=distance(attacked, clean))
        work = self._file(model, ratio, seed, name).with_suffix("")  # its own, so that two scripts may run at once
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        anchors = {"clean": clean, "attacked": attacked, "guarded": work / "guarded", None: None}
        if method.anchor == "guarded":
            guard_checkpoint(attacked, work / "guarded", GUARDED_FOR, seed=seed)
        report = repair_checkpoint(
            attacked,
            work / "out",
            anchor=anchors[method.anchor],
            steps=max(at),
            keep_at=at[:-1],
            seed=seed,
            **self._scale.training,
            **method.options,
        )
        recipe = report.recipe
        for steps in at:
            repaired = work / (f"out-{steps}" if steps != max(at) else "out")
            self._measure(
                self._file(model, ratio, seed, name, steps),
                repaired,
                strength=None if method.anchor is None else recipe.strength,
                decoupled=None if method.anchor is None else recipe.decoupled,
                distance=distance(repaired, clean),
                seconds=report.seconds,
            )
        shutil.rmtree(work)

    def rows(self, model: str, ratio: float, seed: int, name: str) -> list[dict[str, Any]]:
        """What was measured of that method, a row for each number of steps and each precision."""
        rows: list[dict[str, Any]] = []
        for steps in self._steps(ratio, seed, name):
            if not self._file(model, ratio, seed, name, steps).exists():
                continue
            clean, attacked, found = self.measured(model, ratio, seed, name, steps)
            compared = PromptComparison(clean["prompts"], attacked["prompts"], found["prompts"])
            for precision in PRECISIONS:
                before, noisy, after = (each[precision] for each in (clean, attacked, found))
                rows.append(
                    {
                        "model": model,
                        "block": f"{self._scale.accumulate} x {self._scale.block_size}",
                        "ratio": ratio,
                        "seed": seed,
                        "sigma": attacked["noise"]["sigma"],
                        "method": name,
                        "strength": found["strength"],
                        "decoupled": found["decoupled"],
                        "steps": steps,
                        "precision": precision,
                        "clean": before["text"],
                        "attacked": noisy["text"],
                        "defended": after["text"],
                        "recovery": _recovery(before["text"], noisy["text"], after["text"]),
                        "other text, clean": before["other text"],
                        "other text, attacked": noisy["other text"],
                        "other text, defended": after["other text"],
                        "other text, recovery": _recovery(
                            before["other text"], noisy["other text"], after["other text"]
                        ),
                        "prompts improved": compared.improved if precision == "BF16" else None,
                        "prompts ordered": compared.ordered if precision == "BF16" else None,
                        "variance reduction": compared.variance_reduction if precision == "BF16" else None,
                        "distance": found["distance"],
                        "attacked distance": attacked["distance"],
                        "tokens": self._scale.tokens,
                    }
                )
        return rows

    def measured(self, model: str, ratio: float, seed: int, name: str, steps: int) -> tuple[dict[str, Any], ...]:
        """Of the clean, the attacked and the repaired model."""
        files = (
            self._file(model, "clean"),
            self._file(model, ratio, seed),
            self._file(model, ratio, seed, name, steps),
        )
        clean, attacked, defended = (json.loads(file.read_text()) for file in files)
        return clean, attacked, defended

    def noise(self, model: str, seed: int) -> tuple[dict[float, float], dict[float, float]]:
        """For one seed: all ratios measured while noise was calibrated, and the wanted ratios, each by sigma."""
        measured: dict[float, float] = {}
        wanted: dict[float, float] = {}
        for ratio in RATIOS:
            file = self._file(model, ratio, seed)
            if file.exists():
                found = json.loads(file.read_text())["noise"]
                measured |= {float(sigma): float(reached) for sigma, reached in found["measured"]}
                wanted[float(found["sigma"])] = ratio
        return measured, wanted

    def _steps(self, ratio: float, seed: int, name: str) -> tuple[int, ...]:
        return METHODS[name].at if (ratio, seed) == (MAIN, 0) else SHORTENED.get(name, METHODS[name].at)

    def _measure(self, file: Path, folder: Path, **more: Any) -> None:
        if not file.exists():
            found = {**measure(folder, self._scale), **more}
            atomic_write(file, json.dumps(found))
            shown = {key: value for key, value in found.items() if key not in ("prompts", "noise")}
            print(file.stem, json.dumps(shown), flush=True)

    def _file(self, model: str, *parts: object) -> Path:
        name = "--".join(str(part) for part in (model, *parts))
        return self._folder / f"{name.replace(' ', '_').replace(',', '').replace('/', '-')}.json"


def _recovery(clean: float, attacked: float, defended: float) -> float | None:
    return recovery(clean, attacked, defended) if attacked > clean else None


def draw(runs: Runs, rows: list[dict[str, Any]], output: Path) -> None:
    """The figures of the paper for the first model and the first seed."""
    model, seed = rows[0]["model"], rows[0]["seed"]
    measured, wanted = runs.noise(model, seed)
    if len(measured) > 1:
        plot_noise(measured, wanted, _beside(output, "noise"))
    last = {(row["ratio"], row["method"]): row["steps"] for row in rows if (row["model"], row["seed"]) == (model, seed)}
    ratio = rows[0]["ratio"]
    by_noise, by_method = {}, {}
    for (each, name), steps in last.items():
        compared = PromptComparison(*(found["prompts"] for found in runs.measured(model, each, seed, name, steps)))
        if name in SHORTENED:
            by_noise[f"{name}, r = {each:.2f}"] = compared
        if each == ratio:
            by_method[f"{name}, {steps} steps"] = compared
    plot_ordering(by_noise, _beside(output, "ordering"))
    plot_variance(by_noise, _beside(output, "variance"))
    prompts = len(next(iter(by_method.values())).clean)
    categories = suite_categories()[:: len(suite_categories()) // prompts]
    plot_categories(
        {label: compared.by_category(categories) for label, compared in by_method.items()},
        _beside(output, "categories"),
    )


def _beside(output: Path, figure: str) -> Path:
    return output.with_name(f"{output.stem}_{figure}.png")


if __name__ == "__main__":
    main()
