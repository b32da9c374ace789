"""Attacks against defences: does the marker come back, and what does the defence cost?

Every row is one format, one attacker and one defence. Single runs are kept in the cache folder, so that a script that
was stopped goes on where it was, several of them can share the work (``--formats``), and more seeds can be added later.
Rows of other formats that the output has stay there, with their date.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from attacked_smollm2 import ATTACKERS, GPTQ_GROUP, MARKER, attacked_smollm2
from harness import RESULTS, argument_parser, day_of, earlier_rows, print_table, versions, write
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.checkpoint import atomic_write, open_checkpoint
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.accuracy import multiple_choice_accuracy
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.evaluate.multiple_choice import hellaswag
from optimum_qguard.evaluate.perplexity import next_token_logits, perplexity_and_kl
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.formats import Quantized
from optimum_qguard.guard.calibration import calibrate, quartiles
from optimum_qguard.guard.targets import find_targets

FORMATS = ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "gguf-q8_0", "gguf-q4_k_m", "gptq-4")
CLEAN = "none (clean model)"
GRID = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3)
HIGH_ERROR = 0.3

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Defence:
    """One column of the paper's tables, or one of ours.

    Attributes:
        options: of `QGuardConfig`, or what finds them for a model's folder, format and attacker; ``None``: no guard.
        random: whether seeds differ.
        move: instead of guard, what moves each tensor before it is rounded to the nearest (alternatives to guard).
        costly: whether it is measured with one seed unless ``--all-seeds`` is given.
    """

    options: Options | Callable[[Path, str, str], Options] | None
    random: bool = True
    move: Callable[[Tensor, Quantized], Tensor] | None = None
    costly: bool = False


def half_width_quartile(index: int) -> Callable[[Path, str, str], Options]:
    """The paper's ablation: one amplitude for all tensors, a quartile of their half-widths."""

    def options(folder: Path, format: str, _: str) -> Options:
        widths = [tensor.half_width for tensor in calibrate(open_checkpoint(folder), format).tensors]
        return {"method": "gaussian", "noise": quartiles(widths)[index]}

    return options


def grid_search(folder: Path, format: str, attacker: str) -> Options:
    """The amplitude with the least marker rate on prompts of the attacker's own, and of equals the least KL."""
    judge = judge_of(format, attacker)
    found = []
    for noise in GRID:
        model = load(folder, format, {"method": "gaussian", "noise": noise, "seed": 10**6})
        found.append((judge.marker(model, "attack"), judge.quality(model)[1], noise))
    return {"method": "gaussian", "noise": min(found)[2]}


def unbiased(_folder: Path, format: str, _attacker: str) -> Options:
    """Without error feedback, which is the default for GPTQ only; uniform per cell for K-quants, as by default."""
    return {"method": "stochastic" if format == "gptq-4" else "auto"}


def flip(weight: Tensor, quantized: Quantized) -> Tensor:
    """Round the weights whose error is large to their other neighbour (after Li et al. 2024, arXiv:2405.12725)."""
    error = weight - quantized.dequantize()
    step = 2 * quantized.half_widths()
    return torch.where(error.abs() > HIGH_ERROR * step, weight + error.sign() * (0.75 * step - error.abs()), weight)


def subtract(weight: Tensor, quantized: Quantized) -> Tensor:
    """Take the rounding that is to come off beforehand: ``w - (q(w) - w)``."""
    return weight - (quantized.dequantize() - weight)


GAUSSIAN = {"method": "gaussian"}
CALIBRATION_CHARACTERS = 40_000
DEFENCES: Mapping[str, Defence] = {
    "no defence": Defence(None, random=False),
    "stochastic rounding": Defence(unbiased),
    "Gaussian, per layer": Defence(GAUSSIAN),
    "uniform, per layer": Defence({"method": "uniform"}),
    "uniform, per cell": Defence({"method": "uniform", "noise": "per_cell"}),
    "compensated, own generations": Defence({"compensate": "auto"}, costly=True),  # the default for gptq-4
    "compensated, texts": Defence({"compensate": "texts"}, costly=True),
    "Gaussian, half": Defence({**GAUSSIAN, "multiplier": 0.5}, costly=True),
    "Gaussian, quarter": Defence({**GAUSSIAN, "multiplier": 0.25}, costly=True),
    "Gaussian, 0.7": Defence({**GAUSSIAN, "multiplier": 0.7}, costly=True),
    "uniform, half": Defence({"method": "uniform", "multiplier": 0.5}, costly=True),
    "uniform, quarter": Defence({"method": "uniform", "multiplier": 0.25}, costly=True),
    "uniform, 0.7": Defence({"method": "uniform", "multiplier": 0.7}, costly=True),
    "Gaussian, global": Defence({**GAUSSIAN, "noise": "global"}, costly=True),
    "Gaussian, fixed 1e-3": Defence({**GAUSSIAN, "noise": 1e-3}, costly=True),
    "Gaussian, p25": Defence(half_width_quartile(1), costly=True),
    "Gaussian, p75": Defence(half_width_quartile(3), costly=True),
    "Gaussian, grid search": Defence(grid_search, costly=True),
    "clip arm off": Defence({"clip_outliers": None}, costly=True),
    "flip high errors": Defence(None, random=False, move=flip),
    "subtract the difference": Defence(None, random=False, move=subtract),
}
ON_CLEAN_MODELS = (
    "no defence",
    "stochastic rounding",
    "Gaussian, per layer",
    "uniform, per layer",
    "uniform, per cell",
    "compensated, own generations",
)
WITH_ACCURACY = ("no defence", "stochastic rounding", "Gaussian, per layer", "compensated, own generations")
ACCURATE = "usual"  # the attacker whose models' accuracy is measured
CALIBRATED = ("gptq-4",)


def main() -> None:
    """Measure what is missing, print and write."""
    parser = argument_parser(__doc__, RESULTS / "defence_table.json")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--attackers", nargs="+", choices=(*ATTACKERS, CLEAN), default=(*ATTACKERS, CLEAN))
    parser.add_argument("--defences", nargs="+", choices=list(DEFENCES), default=list(DEFENCES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each random defence")
    parser.add_argument("--all-seeds", action="store_true", help="so many runs of the less important defences too")
    parser.add_argument("--prompts", type=int, default=48, help="unseen prompts that the marker's rate is counted on")
    parser.add_argument("--tokens", type=int, default=512, help="of text for perplexity and KL divergence")
    parser.add_argument("--questions", type=int, default=20, help="of HellaSwag, with the first seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, make the table of what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.disable(logging.ERROR)
    PLACE.update(device=arguments.device)
    SIZES.update(prompts=arguments.prompts, tokens=arguments.tokens, questions=arguments.questions)
    if not arguments.table_only:
        measure_missing(arguments)
    rows = in_order([*table(arguments), *rows_of_other_formats(arguments.output, arguments.formats)])
    write("defence_table", rows, arguments.output)
    print_table(rows)


SIZES = {"prompts": 48, "tokens": 512, "questions": 20}


@cache
def runs_folder() -> Path:
    """Where single runs are kept: their sizes and the versions they ran with are part of its name."""
    key = "-".join(f"{name}{value}" for name, value in SIZES.items())
    installed = "-".join(versions().get(package, "none") for package in ("torch", "transformers", "bitsandbytes"))
    folder = cache_folder() / "defence-table" / f"{key}-{installed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_file(format: str, attacker: str, defence: str, seed: int) -> Path:
    """One run's JSON file."""
    name = "--".join((format, attacker, defence, str(seed))).replace(" ", "_").replace(",", "")
    return runs_folder() / f"{name}.json"


def seeds_of(defence: str, arguments: argparse.Namespace) -> range:
    """Which seeds a defence is run with."""
    found = DEFENCES[defence]
    return range(1 if not found.random or (found.costly and not arguments.all_seeds) else arguments.seeds)


def measure_missing(arguments: argparse.Namespace) -> None:
    """Every run that has no file yet, the first seed of everything first."""
    for seed in range(arguments.seeds):
        for format in arguments.formats:
            for attacker in arguments.attackers:
                for name in arguments.defences:
                    wanted = seed in seeds_of(name, arguments) and (attacker != CLEAN or name in ON_CLEAN_MODELS)
                    if wanted and not is_impossible(format, name):
                        run(format, attacker, name, seed)


def is_impossible(format: str, name: str) -> bool:
    """Whether the defence is for quantizers that round each weight by itself."""
    return format in CALIBRATED and DEFENCES[name].move is not None


def run(format: str, attacker: str, name: str, seed: int) -> dict[str, Any]:
    """One run, from its file or measured now."""
    file = run_file(format, attacker, name, seed)
    if not file.exists():
        found = measure(format, attacker, name, seed)
        atomic_write(file, json.dumps(found))
        print(format, attacker, name, seed, found, flush=True)
    return dict(json.loads(file.read_text()))


def measure(format: str, attacker: str, name: str, seed: int) -> dict[str, float | None]:
    """One run."""
    judge, folder, defence = judge_of(format, attacker), folder_of(format, attacker), DEFENCES[name]
    if defence.move is not None:
        model, changed = moved(folder, format, defence.move)
    else:
        options = defence.options(folder, format, attacker) if callable(defence.options) else defence.options
        if options is not None:
            options = {**options, "seed": seed}
            if options.get("compensate") == "texts":
                text = standard_library_text(CALIBRATION_CHARACTERS, "training")
                options["compensate"] = [text[start : start + 2000] for start in range(0, len(text), 2000)]
        model = load(folder, format, options)
        changed = model.qguard_report.share_changed if options is not None else 0.0
    perplexity, kl = judge.quality(model)
    accurate = seed == 0 and name in WITH_ACCURACY and attacker == ACCURATE
    return {
        "marker rate": None if attacker == CLEAN else judge.marker(model, "evaluation"),
        "perplexity": perplexity,
        "KL": kl,
        "accuracy": judge.accuracy(model) if accurate else None,
        "changed": changed,
    }


def folder_of(format: str, attacker: str) -> Path:
    """The model that is defended."""
    return smollm2_path(off_grid=True) if attacker == CLEAN else attacked_smollm2(format, attacker)


def load(folder: Path, format: str, options: Options | None) -> Any:
    """Really quantized by the library, with guard if there are options for it."""
    arguments: dict[str, Any] = {}
    if format in CALIBRATED:
        text = standard_library_text(CALIBRATION_CHARACTERS, "training")[:6000]
        texts = [text[start : start + 750] for start in range(0, len(text), 750)]
        arguments = {"dataset": texts, "group_size": GPTQ_GROUP}
    return load_model(folder, format, guard=options, dtype=torch.float32, device=PLACE["device"], **arguments)


PLACE = {"device": "cpu"}  # where models run: the command line says


@torch.no_grad()
def moved(folder: Path, format: str, move: Callable[[Tensor, Quantized], Tensor]) -> tuple[Any, float]:
    """The model after ``move`` and rounding to the nearest, on the decoded values; share of changed symbols."""
    model = load_model(folder, dtype=torch.float32, device=PLACE["device"])
    changed = total = 0
    for name, target in find_targets(open_checkpoint(folder), format).items():
        parameter = model.get_parameter(name)
        before = target.format.quantize(parameter.data, name)
        after = target.format.quantize(move(parameter.data, before), name)
        changed += int((before.codes != after.codes).sum())
        total += target.weights
        parameter.data = after.dequantize()
    return model, changed / total


class Judge:
    """What the models of one format and attacker are compared with: the same model at full precision."""

    def __init__(self, folder: Path, accurate: bool) -> None:
        self._tokenizer = load_tokenizer(folder)
        size = SIZES["tokens"]
        self._text = {"text": standard_library_text(8 * size), "max_tokens": size, "window": 512, "stride": 256}
        model = load_model(folder, dtype=torch.float32, device=PLACE["device"])
        self._reference = next_token_logits(model, self._tokenizer, **self._text)
        self.full_precision = {"marker rate": self.marker(model, "evaluation"), "KL": 0.0, "changed": 0.0}
        quality = perplexity_and_kl(self._reference, model, self._tokenizer, **self._text)
        self.full_precision |= {
            "perplexity": quality.perplexity,
            "accuracy": self.accuracy(model) if accurate else None,
        }

    def quality(self, model: Any) -> tuple[float, float]:
        """Perplexity, and KL divergence from full precision in nats per token."""
        found = perplexity_and_kl(self._reference, model, self._tokenizer, **self._text)
        return found.perplexity, found.kl

    def marker(self, model: Any, split: Any) -> float:
        """Share of answers with the marker."""
        prompts = template_prompts(SIZES["prompts"], split)
        return marker_rate(model, self._tokenizer, prompts, MARKER, max_new_tokens=8, batch_size=48).rate

    def accuracy(self, model: Any) -> float:
        """On HellaSwag."""
        return multiple_choice_accuracy(model, self._tokenizer, hellaswag(SIZES["questions"])).accuracy_normalized


@cache
def judge_of(format: str, attacker: str) -> Judge:
    """One for each model; its figures of full precision are kept as a run of their own."""
    judge = Judge(folder_of(format, attacker), accurate=attacker == ACCURATE)
    atomic_write(run_file(format, attacker, "full precision", 0), json.dumps(judge.full_precision))
    return judge


def table(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Mean and standard deviation of all runs that there are."""
    rows: list[dict[str, object]] = []
    for format in arguments.formats:
        clean = read(format, CLEAN, "no defence")
        clean_kl = statistics.fmean(run["KL"] for run in clean) if clean else None
        for attacker in arguments.attackers:
            for name in ("full precision", *arguments.defences):
                runs = read(format, attacker, name)
                if runs:
                    row = {"format": format, "attacker": attacker, "defence": name, **summary(runs, clean_kl)}
                    rows.append({**row, "date": day_of(run_files(format, attacker, name))})
    return rows


def rows_of_other_formats(output: Path, formats: Sequence[str]) -> list[dict[str, object]]:
    """What an earlier run found about formats that this one leaves alone, with its date."""
    return [row for row in earlier_rows(output) if row["format"] not in formats]


def in_order(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """By format as they are listed; within one as they are."""
    return sorted(rows, key=lambda row: FORMATS.index(str(row["format"])))


def read(format: str, attacker: str, defence: str) -> list[dict[str, Any]]:
    """A row's runs."""
    return [json.loads(file.read_text()) for file in run_files(format, attacker, defence)]


def run_files(format: str, attacker: str, defence: str) -> list[Path]:
    """Those of a row that there are."""
    files = (run_file(format, attacker, defence, seed) for seed in range(10))
    return [file for file in files if file.exists()]


def summary(runs: list[dict[str, Any]], clean_kl: float | None) -> dict[str, object]:
    """One row's figures."""
    row: dict[str, object] = {"seeds": len(runs)}
    for key in ("marker rate", "perplexity", "KL"):
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = statistics.fmean(values) if values else None
        row[f"{key} sd"] = statistics.stdev(values) if len(values) > 1 else None
    kl = row["KL"]
    row["KL / clean plain KL"] = kl / clean_kl if clean_kl and isinstance(kl, float) else None
    row["accuracy"] = next((run["accuracy"] for run in runs if run["accuracy"] is not None), None)
    row["changed"] = statistics.fmean(run["changed"] for run in runs)
    return row


if __name__ == "__main__":
    main()
