"""GPT-NeoX and Pythia: fused projections by head, heads rotated in part, LayerNorm, a plain MLP.

Attention and MLP have a norm each, in parallel or one after the other.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Grouped, ungrouped_heads_of
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

ATTENTION = Grouped("attention.query_key_value")

register(
    Family(
        ("gpt_neox",),
        ("gpt_neox.layers.", "layers."),
        (
            Norm("input_layernorm", ATTENTION.modules()),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ValueOutput(ATTENTION, "attention.dense"),
            QueryKey(ATTENTION, partial=True),
        ),
        (
            "mlp.dense_4h_to_h.weight",
            "mlp.dense_4h_to_h.bias",
            # The causal mask and frequencies, which old versions of transformers stored.
            "attention.bias",
            "attention.masked_bias",
            "attention.rotary_emb.inv_freq",
        ),
        heads=ungrouped_heads_of,
    )
)
