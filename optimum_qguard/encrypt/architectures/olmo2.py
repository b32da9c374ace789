"""OLMo 2: norms come after attention and MLP, into the residual stream, so they are no sites.

Queries and keys are normed over all heads at once, after which rotary pairs of each key-value head are free.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import QueryKey, UpDown, ValueOutput

register(
    Family(
        ("olmo2",),
        LAYERS,
        (
            ValueOutput(ATTENTION, "self_attn.o_proj"),
            UpDown("mlp.up_proj", "mlp.down_proj"),
            QueryKey(ATTENTION, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        ),
        (
            "post_attention_layernorm.weight",
            "post_feedforward_layernorm.weight",
            "mlp.gate_proj.weight",
            *IGNORED,
        ),
    )
)
