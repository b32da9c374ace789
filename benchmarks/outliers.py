"""What outlier injection does to really quantized models, and what the clip arm of guard brings back."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, argument_parser, print_table, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_qguard import QGuardConfig
from optimum_qguard.attacks.outlier_injection import inject_balanced_outliers, inject_outliers
from optimum_qguard.checkpoint import CheckpointReader, open_checkpoint, transform_checkpoint
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.perplexity import perplexity
from optimum_qguard.guard.backends import preset
from optimum_qguard.guard.targets import Target, find_targets

BACKENDS = ("bnb-int8", "bnb-nf4")
CHOSEN = 20
GUARDS: Mapping[str, Mapping[str, Any]] = {"guard, no clipping": {"clip_outliers": None}, "guard": {}}

Targets = Mapping[str, Target]
Attack = Callable[[CheckpointReader, Path, Targets], object]


def varied(
    reader: CheckpointReader,
    out: Path,
    targets: Targets,
    *,
    in_block: int = 1,
    factors: tuple[float, float] = (512, 512),
    share: float = 1.0,
) -> None:
    """Outliers of an attacker who varies: the ``in_block`` largest weights of a share of the blocks, each multiplied by
    a factor of its own between the two given ones."""
    generator = torch.Generator().manual_seed(0)

    def inject(name: str, tensor: Tensor) -> Tensor:
        if name not in targets:
            return tensor
        target = targets[name]
        weight = target.oriented(tensor)
        blocks = target.format.blocks(weight)
        largest = blocks.abs().topk(in_block, dim=1).indices
        low, high = factors
        factor = low * (high / low) ** torch.rand(largest.shape, generator=generator)
        hit = torch.rand(len(blocks), 1, generator=generator) < share
        changed = blocks.scatter(1, largest, blocks.gather(1, largest) * torch.where(hit, factor, 1.0))
        return target.oriented(target.format.unblock(changed, weight.shape))

    transform_checkpoint(reader, out, inject)


def chosen(attack: Attack, reader: CheckpointReader, out: Path, targets: Targets) -> object:
    """An attack on `CHOSEN` tensors, spread over the layers and kinds."""
    names = sorted(targets)[:: len(targets) // CHOSEN][:CHOSEN]
    return attack(reader, out, {name: targets[name] for name in names})


RANDOM_SIGNS = partial(inject_outliers, random_signs=True)
ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "x512": inject_outliers,
    "x512, 20 tensors": partial(chosen, inject_outliers),
    "x16": partial(inject_outliers, factor=16),
    "three a block": partial(varied, in_block=3),
    "a tenth of the blocks": partial(varied, share=0.1),
    "x16 to x512, 20 tensors": partial(chosen, partial(varied, factors=(16, 512))),
    "x512, random signs": RANDOM_SIGNS,
    "x512, random signs, 20 tensors": partial(chosen, RANDOM_SIGNS),
    "balanced": inject_balanced_outliers,
}


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "outliers.json")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--attacks", nargs="+", choices=tuple(ATTACKS), default=tuple(ATTACKS))
    parser.add_argument("--tokens", type=int, default=1024, help="how much of the text")
    parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 moved off the Q4_1 grid it came on")
    arguments = parser.parse_args()
    disable_progress_bar()
    # LLM.int8 says for every matrix product that it casts float32 to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """All rows, written as they come."""
    reader = open_checkpoint(arguments.model or smollm2_path(off_grid=True))
    tokenizer = AutoTokenizer.from_pretrained(reader.folder)
    text = standard_library_text(8 * arguments.tokens)
    rows: list[dict[str, object]] = []
    for backend in arguments.backends:
        clean: dict[str, float] = {}
        targets = find_targets(reader, backend)
        for name in dict.fromkeys(("none", *arguments.attacks)):
            with _attacked(reader, ATTACKS[name], targets) as folder:

                def measured(config: Any, folder: Path = folder) -> tuple[float, Any]:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model = AutoModelForCausalLM.from_pretrained(
                            folder, quantization_config=config, device_map={"": arguments.device}
                        )
                    found = perplexity(model, tokenizer, text, max_tokens=arguments.tokens)
                    return found, getattr(model, "qguard_report", None)

                found = {"full precision": measured(None)[0], "plain": measured(preset(backend))[0]}
                clipped = 0
                for guard, options in GUARDS.items():
                    found[guard], report = measured(QGuardConfig(preset(backend), seed=0, **options))
                    clipped = report.clipped
                clean = clean or found
                rows.append(
                    {
                        "model": arguments.model or "SmolLM2-135M, off grid",
                        "tokens": arguments.tokens,
                        "device": arguments.device,
                        "backend": backend,
                        "attack": name,
                        **found,
                        "clipped": clipped,
                        "guard / clean guard": found["guard"] / clean["guard"],
                        "guard / clean plain": found["guard"] / clean["plain"],
                    }
                )
            write("outliers", rows, arguments.output)
    print_table(rows)


@contextlib.contextmanager
def _attacked(reader: CheckpointReader, attack: Attack | None, targets: Targets) -> Any:
    """The folder of an attacked model, gone afterwards."""
    if attack is None:
        yield reader.folder
        return
    folder = Path(tempfile.mkdtemp())
    try:
        attack(reader, folder / "model", targets)
        yield folder / "model"
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
