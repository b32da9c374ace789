"""Models to repair: tiny, random, with a tokenizer of words; and how to damage them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "max_position_embeddings": 64,
        },
    ),
}


def save_clean(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A random model, its tokenizer and a model card."""
    model_class, config_class, arguments = CONFIGS[name]
    config = getattr(transformers, config_class)(**{**arguments, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


def save_tokenizer(folder: Path) -> None:
    """Of the words w0 to w127; in place of w1 there is the end."""
    names = ["w0", "<end>", *(f"w{index}" for index in range(2, 128))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="<end>").save_pretrained(folder)


def save_damaged(clean: Path, folder: Path, sigma: float = 0.02, seed: int = 1) -> Path:
    """The same with noise on its linear weights and experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(clean, dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "emb" not in name and "head" not in name and "wte" not in name:
                weight += sigma * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    model.save_pretrained(folder)
    for file in clean.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def words(n_tokens: int, seed: int = 0) -> str:
    """A text of so many words, each of which foretells the next."""
    return " ".join(f"w{2 + (seed + index * index // 3) % 60}" for index in range(n_tokens))
