from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return {
        "embed.weight": torch.randn(16, 8, generator=generator).bfloat16(),
        "layers.0.weight": torch.randn(8, 8, generator=generator),
        "layers.0.bias": torch.randn(8, generator=generator).half(),
        "layers.1.weight": torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn),
        "experts": torch.randn(2, 3, 4, generator=generator),
        "mask": torch.tensor([True, False]),
        "step": torch.tensor(3),
        "nothing": torch.zeros(0, 4),
    }


@pytest.fixture
def write(tmp_path: Path, tensors: Tensors) -> Callable[..., Path]:
    """Writes `tensors` as a checkpoint folder in the given number of shards, with a config and other files."""

    def write_checkpoint(shards: int = 1, name: str = "in", config: dict[str, object] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        (folder / "tokenizer.json").write_text('{"größe": 1}', encoding="utf-8")
        (folder / "README.md").write_bytes(b"# Model\r\n")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        return folder

    return write_checkpoint
