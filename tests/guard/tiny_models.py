"""Random models of many architectures, small enough to quantize in a blink."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256}
_EXPERTS = {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", {**_TEXT, "vocab_size": 512}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_LLAMA, **_EXPERTS}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_TEXT, "image_size": 32, "patch_size": 8, "num_labels": 5}),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A model of `CONFIGS`, its weights always the same; ``options`` are its configuration's."""
    model_class, config_class, arguments = CONFIGS[name]
    config: PreTrainedConfig = getattr(transformers, config_class)(**{**arguments, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
    return model.to(dtype).eval()


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny_model(name, dtype, **options).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are w0 to w511."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w2")
    tokenizer.save_pretrained(folder)
    return tokenizer
