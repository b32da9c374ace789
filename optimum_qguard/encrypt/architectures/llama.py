"""Llama and what has its layers: separate projections with rotary halves, gated MLP, a norm before each.

Qwen2 has biases on queries, keys and values; Qwen3 norms queries and keys over a head; some layers of SmolLM3 do not
rotate, for which pairs of dimensions are only more than needed. Granite's multipliers are constants.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Separate
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

ATTENTION = Separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYERS = ("model.layers.", "layers.")
# Written by old versions of transformers; recomputed on load.
IGNORED = ("self_attn.rotary_emb.inv_freq",)
COMMON = (
    Norm("input_layernorm", ATTENTION.modules()),
    Norm("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ValueOutput(ATTENTION, "self_attn.o_proj"),
    UpDown("mlp.up_proj", "mlp.down_proj"),
)

register(Family(("llama", "mistral", "qwen2", "granite", "smollm3"), LAYERS, (*COMMON, QueryKey(ATTENTION)), IGNORED))
register(
    Family(
        ("qwen3",),
        LAYERS,
        (*COMMON, QueryKey(ATTENTION, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")),
        IGNORED,
    )
)
