"""Phi-1 and Phi-2: attention and a plain MLP side by side behind one LayerNorm, heads rotated in part."""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

register(
    Family(
        ("phi",),
        LAYERS,
        (
            Norm("input_layernorm", (*ATTENTION.modules(), "mlp.fc1")),
            ValueOutput(ATTENTION, "self_attn.dense"),
            QueryKey(ATTENTION, partial=True, query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm"),
        ),
        ("mlp.fc2.weight", "mlp.fc2.bias", *IGNORED),
    )
)
