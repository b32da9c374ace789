"""A checkpoint as a GGUF file, and llama.cpp running it: for SmolLM2, whose own GGUF file lends its tokenizer.

The file is what llama.cpp's convert script and ``llama-quantize`` make: names, mixture and layout (query and key rows
in llama.cpp's order) are theirs, and each tensor is quantized by libgguf, which is ggml's quantizer byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.generation import Answer
from optimum_qguard.evaluate.smollm2 import gguf_file
from optimum_qguard.formats import WeightError
from optimum_qguard.guard.targets import find_targets

_OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf(folder: Path, kind: str, path: Path) -> None:
    """Quantize a SmolLM2 checkpoint to a file type, for instance ``"q8_0"``.

    Raises:
        WeightError: a scale that is not finite, which llama.cpp refuses.
    """
    import gguf
    import libgguf

    source = gguf.GGUFReader(gguf_file())
    reader = open_checkpoint(folder)
    targets = find_targets(reader, f"gguf-{kind}")
    config = reader.config
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith(_OWN):
            types = field.types
            writer.add_key_value(key, field.contents(), types[0], types[-1] if len(types) > 1 else None)
    for name in reader.tensors:
        weight = reader.read(name).float()
        for letter, count in heads.items():
            if name.endswith(f"self_attn.{letter}_proj.weight"):
                weight = in_pairs(weight, count)
        stored, written = weight.numpy(), names.get_name(name, try_suffixes=(".weight",))
        if name not in targets:
            writer.add_tensor(written, stored)
            continue
        dtype = gguf.GGMLQuantizationType[targets[name].format.kind.upper()]
        symbols = libgguf.quantize_rows(stored, libgguf.GGMLQuantizationType[dtype.name])
        if not np.isfinite(libgguf.dequantize_rows(symbols, libgguf.GGMLQuantizationType[dtype.name])).all():
            raise WeightError(f"{name}: weights too large for GGUF's float16 scales")
        writer.add_tensor(written, symbols, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, ``(out_features, in_features)``, as llama.cpp rotates them: the two members
    of each rotary pair side by side."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


class LlamaCpp:
    """llama.cpp with a model of ours.

    Args:
        path: a GGUF file.
        tokenizer: the model's; prompts are given as its tokens.
        context: the most tokens of a prompt and its answer.
    """

    def __init__(self, path: Path, tokenizer: Any, context: int = 1024) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        self._server = xllamacpp.Server(parameters)
        self._tokenizer = tokenizer

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to the user's turn of a chat."""
        found = []
        for prompt in prompts:
            chat = [{"role": "user", "content": prompt}]
            encoded = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            text = str(self._complete(encoded["input_ids"], max_tokens=max_new_tokens)["text"])
            found.append(Answer(tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]), text))
        return found

    def log_probabilities(self, tokens: Sequence[int]) -> Tensor | None:
        """``(vocabulary,)`` float64 of the token that comes next; ``None`` where the likeliest is part of a character,
        because the server then gives none."""
        size = len(self._tokenizer)
        found = self._complete(tokens, max_tokens=1, logprobs=size)["logprobs"]
        if found is None:
            return None
        values = torch.full((size,), -torch.inf, dtype=torch.float64)
        for each in found["content"][0]["top_logprobs"]:
            values[each["id"]] = each["logprob"]
        return values

    def _complete(self, tokens: Sequence[int], **options: Any) -> Any:
        asked = {"prompt": list(tokens), "temperature": 0.0, **options}
        return self._server.handle_completions(asked)["choices"][0]
