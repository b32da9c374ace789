"""Random models of every known architecture, their norms, biases and routers too; two layers, a few kilobytes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "pad_token_id": 0}
_LLAMA = {
    **_TEXT,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_MOE = {**_LLAMA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {**_LLAMA, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 4}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
_BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
_OPT = {**_TEXT, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}
_FALCON = {**_TEXT, "bias": True}

ALL = frozenset({"norm", "value", "up", "key"})


@dataclass(frozen=True)
class Case:
    """A configuration, and which kinds of site every layer of it must have."""

    model_type: str
    options: dict[str, Any]
    kinds: frozenset[str] = ALL
    model_class: str | None = None
    saving: dict[str, Any] = field(default_factory=dict)


_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_FUSED = {"save_original_format": False}

CASES = {
    "llama": Case("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Case("llama", {**_LLAMA, "head_dim": 24, "tie_word_embeddings": True}),
    "llama-multi-query": Case("llama", {**_LLAMA, "num_key_value_heads": 1}),
    "mistral": Case("mistral", {**_LLAMA, "sliding_window": 4}),
    "qwen2": Case("qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {**_LLAMA, "head_dim": 24, "attention_bias": True}),
    "granite": Case("granite", {**_LLAMA, "residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    "smollm3": Case("smollm3", {**_LLAMA, "no_rope_layer_interval": 2}),
    "mixtral": Case("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "mixtral-fused": Case("mixtral", {**_LLAMA, "num_local_experts": 4}, saving=_FUSED),
    "qwen2-moe": Case("qwen2_moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}),
    "qwen2-moe-fused": Case("qwen2_moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 48}, saving=_FUSED),
    "qwen3-moe": Case("qwen3_moe", {**_QWEN_MOE, "head_dim": 24}),
    "qwen3-moe-fused": Case("qwen3_moe", {**_QWEN_MOE, "head_dim": 24, "decoder_sparse_step": 2}, saving=_FUSED),
    "gemma": Case("gemma", {**_LLAMA, "head_dim": 24}, ALL - {"norm"}),
    "gemma2": Case("gemma2", _GEMMA, ALL - {"norm"}),
    "gemma3-text": Case("gemma3_text", _GEMMA, frozenset({"value", "up"})),
    "gemma3-vision": Case(
        "gemma3",
        {
            "text_config": _GEMMA,
            "vision_config": {**_SMALL, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
        },
        frozenset({"value", "up"}),
        "Gemma3ForConditionalGeneration",
    ),
    "phi": Case("phi", {**_LLAMA, "partial_rotary_factor": 0.5}, ALL - {"up"}),
    "phi-qk-norm": Case("phi", {**_LLAMA, "partial_rotary_factor": 0.5, "qk_layernorm": True}, ALL - {"up"}),
    "phi3": Case("phi3", _LLAMA),
    "phi3-partial": Case("phi3", {**_LLAMA, "partial_rotary_factor": 0.75}),
    "gpt2": Case("gpt2", _GPT2, ALL - {"up"}),
    "gpt2-inverse-layer": Case(
        "gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, ALL - {"up"}
    ),
    "gpt-neox": Case("gpt_neox", {**_LLAMA, "rotary_pct": 0.5}, ALL - {"up"}),
    "gpt-neox-serial": Case("gpt_neox", {**_LLAMA, "use_parallel_residual": False}, ALL - {"up"}),
    "opt": Case("opt", _OPT),
    "opt-post-norm": Case("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}, ALL - {"norm"}),
    "opt-plain-norms": Case("opt", {**_OPT, "layer_norm_elementwise_affine": False}, ALL - {"norm"}),
    "opt-gelu": Case("opt", {**_OPT, "activation_function": "gelu", "enable_bias": False}, ALL - {"up"}),
    "falcon-7b": Case("falcon", _FALCON, ALL - {"up"}),
    "falcon-40b": Case("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, ALL - {"up"}),
    "falcon-11b": Case(
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        ALL - {"up"},
    ),
    "falcon-rw-1b": Case(
        "falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}, ALL - {"up"}
    ),
    "falcon-serial": Case("falcon", {**_FALCON, "parallel_attn": False, "bias": False}, ALL - {"up"}),
    "bloom": Case("bloom", _BLOOM, ALL - {"up"}),
    "bloom-residual": Case(
        "bloom", {**_BLOOM, "apply_residual_connection_post_layernorm": True}, frozenset({"value", "key"})
    ),
    "olmo2": Case("olmo2", {**_LLAMA, "attention_bias": True}, ALL - {"norm"}),
    "cohere": Case("cohere", {**_LLAMA, "attention_bias": True}),
    "cohere-qk-norm": Case("cohere", {**_LLAMA, "use_qk_norm": True}),
    "cohere2": Case("cohere2", {**_LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "starcoder2": Case("starcoder2", {**_LLAMA, "sliding_window": 4}, ALL - {"up"}),
    "stablelm": Case("stablelm", {**_LLAMA, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm-12b": Case("stablelm", {**_LLAMA, "qk_layernorm": True, "use_parallel_residual": True}),
    "glm": Case("glm", {**_LLAMA, "head_dim": 16, "attention_bias": True}),
    "glm4": Case("glm4", {**_LLAMA, "head_dim": 16}),
    "deepseek-v3": Case("deepseek_v3", {**_DEEPSEEK, "attention_bias": True}),
    "deepseek-v3-fused": Case("deepseek_v3", _DEEPSEEK, saving=_FUSED),
    "deepseek-v3-plain-query": Case("deepseek_v3", {**_DEEPSEEK, "q_lora_rank": None, "rope_interleave": False}),
}


def random_model(case: Case, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that configuration, its weights always the same."""
    config = CONFIG_MAPPING[case.model_type](**case.options)
    generator = torch.Generator().manual_seed(0)
    model: PreTrainedModel
    if case.model_class is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, case.model_class)(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3
                noise = spread * torch.randn(tensor.shape, generator=generator)
                is_norm = tensor.dim() == 1 and name.endswith("weight")
                tensor.copy_(noise + 1 if is_norm else noise)
    return model.to(dtype).eval()


def save_random(case: Case, folder: Path, dtype: torch.dtype) -> Path:
    random_model(case, dtype).save_pretrained(folder, **case.saving)
    return folder
