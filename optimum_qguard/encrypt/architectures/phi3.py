"""Phi-3 and Phi-4: Llama's layers with fused projections, heads rotated wholly or in part."""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import IGNORED, LAYERS
from optimum_qguard.encrypt.layouts import Stacked
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

ATTENTION = Stacked("self_attn.qkv_proj")

register(
    Family(
        ("phi3",),
        LAYERS,
        (
            Norm("input_layernorm", ATTENTION.modules()),
            Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ValueOutput(ATTENTION, "self_attn.o_proj"),
            UpDown("mlp.gate_up_proj", "mlp.down_proj", stacked=True),
            QueryKey(ATTENTION, partial=True),
        ),
        IGNORED,
    )
)
