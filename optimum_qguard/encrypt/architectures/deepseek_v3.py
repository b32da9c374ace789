"""DeepSeek V3 and R1: latent attention, the first layers dense, then routed experts beside shared ones.

Besides the norm before the attention, those of the compressed queries and of the compressed keys and values are each
read by one linear only. Of a key, the part that is not rotated has its own rows for every head, the rotated part one
set of rows for all heads. Rows of the compressing linears cannot be scaled otherwise: they are normed together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import IGNORED, LAYERS
from optimum_qguard.encrypt.architectures.mixture_of_experts import EXPERT_READERS, EXPERTS
from optimum_qguard.encrypt.layouts import Heads, Layer, Rotary, rotary_pairs
from optimum_qguard.encrypt.sites import Norm, Site, UpDown, always, make_site

Q, Q_A, Q_B = "self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"
KV_A, KV_B, OUTPUT = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"


def heads(config: Any) -> Heads:
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return Heads(config.num_attention_heads, config.num_attention_heads, size)


def compresses_queries(config: Any) -> bool:
    return config.q_lora_rank is not None


@dataclass(frozen=True)
class LatentAttention:
    """Value and key sites of multi-head latent attention.

    ``kv_b_proj`` holds for each head the key's dimensions that are not rotated, then the value; ``kv_a_proj_with_mqa``
    the latent, then the rotated key; the query's linear for each head first what is not rotated.
    """

    when: Callable[[Any], bool] = always

    def modules(self) -> tuple[str, ...]:
        return Q, Q_B, KV_A, KV_B, OUTPUT

    def expand(self, layer: Layer) -> Iterator[Site]:
        config, count = layer.config, layer.heads.queries
        fixed, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        query = Q_B if compresses_queries(config) else Q

        values = torch.arange(count * value).view(count, value)
        rows = torch.cat([torch.full((count, fixed), -1), values], dim=1)
        divided, multiplied = layer.rows(KV_B, rows.flatten()), layer.columns(OUTPUT, values.flatten())
        yield make_site(layer, "value", KV_B, [divided], [multiplied], block=value)

        keys = torch.arange(count * fixed).view(count, fixed)
        key_rows = torch.cat([keys, torch.full((count, value), -1)], dim=1)
        query_rows = torch.cat([keys, torch.full((count, rotated), -1)], dim=1)
        yield make_site(
            layer, "key", KV_B, [layer.rows(KV_B, key_rows.flatten())], [layer.rows(query, query_rows.flatten())]
        )

        kind: Rotary = "interleaved" if config.rope_interleave else "half"
        pairs = rotary_pairs(rotated, rotated, kind)
        key_rows = torch.cat([torch.full((config.kv_lora_rank,), -1), pairs])
        query_rows = torch.cat([torch.full((fixed,), -1), pairs]).repeat(count)
        yield make_site(layer, "key", KV_A, [layer.rows(KV_A, key_rows)], [layer.rows(query, query_rows)])


register(
    Family(
        ("deepseek_v3",),
        LAYERS,
        (
            Norm("input_layernorm", (Q, Q_A, KV_A)),
            Norm("self_attn.q_a_layernorm", (Q_B,), when=compresses_queries),
            Norm("self_attn.kv_a_layernorm", (KV_B,)),
            LatentAttention(),
            Norm(
                "post_attention_layernorm",
                (*EXPERT_READERS, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ),
            *EXPERTS,
            UpDown("mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
        ),
        # Added to the router's scores, not to its input.
        ("mlp.gate.e_score_correction_bias", *IGNORED),
        heads=heads,
    )
)
