"""Falcon: fused projections by key-value head, a plain MLP, one or two LayerNorms, rotation or ALiBi.

Falcon-7B has one key-value head and one norm for attention and MLP, Falcon-40B several and two, Falcon-RW-1B a
key-value head per query head and an MLP after the attention.
"""

from typing import Any

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Grouped, Heads
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

ATTENTION = Grouped("self_attention.query_key_value")
MLP = "mlp.dense_h_to_4h"


def heads(config: Any) -> Heads:
    shared = config.multi_query and not config.new_decoder_architecture
    groups = config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads
    return Heads(config.num_attention_heads, 1 if shared else groups, config.hidden_size // config.num_attention_heads)


def _norms_stay_inside(config: Any) -> bool:
    """The residual stream may continue from the norm's output; current transformers no longer does that."""
    return not getattr(config, "apply_residual_connection_post_layernorm", False)


def one_norm_each(config: Any) -> bool:
    two = config.num_ln_in_parallel_attn in (None, 2)
    return _norms_stay_inside(config) and config.new_decoder_architecture and config.parallel_attn and two


def one_norm_for_both(config: Any) -> bool:
    return _norms_stay_inside(config) and config.parallel_attn and not one_norm_each(config)


def one_after_the_other(config: Any) -> bool:
    return _norms_stay_inside(config) and not config.parallel_attn


register(
    Family(
        ("falcon",),
        ("transformer.h.", "h."),
        (
            Norm("ln_attn", ATTENTION.modules(), when=one_norm_each),
            Norm("ln_mlp", (MLP,), when=one_norm_each),
            Norm("input_layernorm", (*ATTENTION.modules(), MLP), when=one_norm_for_both),
            Norm("input_layernorm", ATTENTION.modules(), when=one_after_the_other),
            Norm("post_attention_layernorm", (MLP,), when=one_after_the_other),
            ValueOutput(ATTENTION, "self_attention.dense"),
            QueryKey(ATTENTION, when=lambda config: not config.alibi),
            QueryKey(ATTENTION, rotary="none", when=lambda config: bool(config.alibi)),
        ),
        ("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias", "self_attention.rotary_emb.inv_freq"),
        heads=heads,
    )
)
