"""A Llama of any size with random weights, written tensor by tensor as a sharded BF16 checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ONE_BILLION = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=True,
)
TINY = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
)


def random_llama(folder: Path, config: LlamaConfig, shard_bytes: int = 500_000_000) -> Path:
    """Write the model, unless ``folder`` is there already.

    Memory taken is one shard. Norms are 1, everything else is normal with the configuration's ``initializer_range``,
    always the same numbers.

    Returns:
        ``folder``.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    shards = _shards(parameters, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: _random(parameters[name].shape, config.initializer_range, generator)
            if parameters[name].ndim > 1
            else torch.ones(parameters[name].shape, dtype=torch.bfloat16)
            for name in names
        }
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(2 * parameter.numel() for parameter in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = LlamaConfig.from_dict({**config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _shards(parameters: dict[str, nn.Parameter], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters.items():
        if shards[-1] and size + 2 * parameter.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * parameter.numel()
    return shards


def _random(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator)
