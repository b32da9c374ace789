"""What llm-compressor makes of an encrypted model, beside its original: KL divergence to the original in BF16.

llm-compressor does not work with the transformers that this package is made for, so this runs in an environment of its
own; README.md beside it says how to make one.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from harness import RESULTS, argument_parser, earlier_rows, print_table, today, write
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.perplexity import kl_divergence, next_token_logits

KEY = Key(bytes(range(32)))
GROUP = 64  # SmolLM2's 576 columns are not a multiple of the usual 128
_EVERYTHING = {"targets": "Linear", "ignore": ["lm_head"]}


def in_groups(name: str) -> dict[str, QuantizationScheme]:
    """One of llm-compressor's schemes with groups of `GROUP` weights, for all linear layers but the output head."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    scheme.weights.group_size = GROUP
    return {"group_0": scheme}


RECIPES: Mapping[str, Callable[[], list[Any]]] = {
    "SmoothQuant, W8A8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        QuantizationModifier(scheme="W8A8", **_EVERYTHING),
    ],
    "GPTQ, W4A16": lambda: [GPTQModifier(config_groups=in_groups("W4A16"), ignore=["lm_head"])],
    "AWQ, W4A16": lambda: [
        AWQModifier(),
        QuantizationModifier(config_groups=in_groups("W4A16_ASYM"), ignore=["lm_head"]),
    ],
    "W8A16": lambda: [QuantizationModifier(config_groups=in_groups("W8A16"), ignore=["lm_head"])],
    "FP8 dynamic": lambda: [QuantizationModifier(scheme="FP8_DYNAMIC", **_EVERYTHING)],
}


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "llm_compressor.json")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--tokens", type=int, default=256, help="how much of the text KL divergence is measured on")
    parser.add_argument("--samples", type=int, default=8, help="of the calibration text")
    parser.add_argument("--sample-tokens", type=int, default=256, help="length of a sample")
    parser.add_argument("--resume", action="store_true", help="keep the rows of other recipes that --output has")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    original = smollm2_path()
    judge = Judge(original, arguments.tokens, arguments.samples, arguments.sample_tokens)
    kept = earlier_rows(arguments.output) if arguments.resume else []
    rows = [row for row in kept if row["recipe"] not in arguments.recipes]
    with tempfile.TemporaryDirectory() as folder:
        encrypted = Path(folder) / "encrypted"
        encrypt_checkpoint(original, encrypted, key=KEY)
        for recipe in arguments.recipes:
            row: dict[str, Any] = {"recipe": recipe}
            for name, model in (("original", original), ("encrypted", encrypted)):
                start = time.perf_counter()
                row |= {name: judge.kl(model, recipe), f"{name} s": time.perf_counter() - start}
            rows.append({**row, "date": today()})
            rows.sort(key=lambda row: list(RECIPES).index(row["recipe"]))
            write("llm_compressor", rows, arguments.output)
    print_table(rows)


class Judge:
    """The original in BF16, and how far a quantized model is from it.

    Args:
        model: a folder.
        n_tokens: of the documentation of Python's standard library.
        n_samples: that llm-compressor calibrates on, from other modules' documentation.
        sample_tokens: length of a sample.
    """

    def __init__(self, model: Path, n_tokens: int, n_samples: int, sample_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._text = standard_library_text(8 * n_tokens)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._logits = next_token_logits(_load(model), self._tokenizer, self._text, max_tokens=n_tokens)
        text = standard_library_text(8 * n_samples * sample_tokens, "training")
        tokens = self._tokenizer(text)["input_ids"][: n_samples * sample_tokens]
        samples = [tokens[start : start + sample_tokens] for start in range(0, len(tokens), sample_tokens)]
        self._samples = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(s) for s in samples]})

    def kl(self, model: Path, recipe: str) -> float | str:
        """Of the quantized model, nats per token; or why there is none."""
        loaded = _load(model)
        try:
            oneshot(
                model=loaded,
                tokenizer=self._tokenizer,
                dataset=self._samples,
                recipe=RECIPES[recipe](),
                max_seq_length=len(self._samples[0]["input_ids"]),
                num_calibration_samples=len(self._samples),
            )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return f"refused: {' '.join(str(error).split())[:200]}"
        found = kl_divergence(self._logits, loaded, self._tokenizer, self._text, max_tokens=self._n_tokens)
        return found if torch.isfinite(torch.tensor(found)) else "NaN"


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


if __name__ == "__main__":
    main()
