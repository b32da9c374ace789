"""Llama's attention before routed experts: Mixtral, Qwen2-MoE, Qwen3-MoE.

The router and every expert read the same norm. Experts are single linears on the Hub and two three-dimensional tensors
in transformers; either may be stored.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

COMMON = (Norm("input_layernorm", ATTENTION.modules()), ValueOutput(ATTENTION, "self_attn.o_proj"))
# Some layers may have an ordinary MLP instead.
EXPERTS = (
    UpDown("mlp.up_proj", "mlp.down_proj"),
    UpDown("mlp.experts.*.up_proj", "mlp.experts.*.down_proj"),
    UpDown("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stacked=True),
)
EXPERT_READERS = (
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.gate",
    "mlp.experts.*.gate_proj",
    "mlp.experts.*.up_proj",
    "mlp.experts.gate_up_proj",
)

register(
    Family(
        ("mixtral",),
        LAYERS,
        (
            *COMMON,
            QueryKey(ATTENTION),
            Norm(
                "post_attention_layernorm",
                (
                    "block_sparse_moe.gate",
                    "block_sparse_moe.experts.*.w1",
                    "block_sparse_moe.experts.*.w3",
                    "mlp.gate",
                    "mlp.experts.gate_up_proj",
                ),
            ),
            UpDown("block_sparse_moe.experts.*.w3", "block_sparse_moe.experts.*.w2"),
            UpDown("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stacked=True),
        ),
        IGNORED,
    )
)
register(
    Family(
        ("qwen2_moe",),
        LAYERS,
        (
            *COMMON,
            QueryKey(ATTENTION),
            Norm(
                "post_attention_layernorm",
                (
                    *EXPERT_READERS,
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                    "mlp.shared_expert_gate",
                ),
            ),
            *EXPERTS,
            UpDown("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
        ),
        IGNORED,
    )
)
register(
    Family(
        ("qwen3_moe",),
        LAYERS,
        (
            *COMMON,
            QueryKey(ATTENTION, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
            Norm("post_attention_layernorm", EXPERT_READERS),
            *EXPERTS,
        ),
        IGNORED,
    )
)
