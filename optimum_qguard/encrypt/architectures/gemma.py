"""Gemma: norms multiply by ``1 + weight``, which no power of two passes through exactly, so they are no sites.

For the same reason Gemma 3, which norms queries and keys, has no key sites. Soft caps come after the inner product.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import QueryKey, UpDown, ValueOutput

SITES = (
    ValueOutput(ATTENTION, "self_attn.o_proj"),
    UpDown("mlp.up_proj", "mlp.down_proj"),
)
# The gate, queries and keys are read through norms that are left alone.
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight")
SANDWICH = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")

register(Family(("gemma",), LAYERS, (*SITES, QueryKey(ATTENTION)), (*NORMS, *IGNORED)))
register(Family(("gemma2",), LAYERS, (*SITES, QueryKey(ATTENTION)), (*NORMS, *SANDWICH, *IGNORED)))
register(
    Family(
        ("gemma3_text", "gemma3"),
        # With a vision tower, as on the Hub and as transformers names it; the tower is left alone.
        (*LAYERS, "language_model.model.layers.", "model.language_model.layers."),
        SITES,
        (*NORMS, *SANDWICH, "self_attn.q_norm.weight", "self_attn.k_norm.weight", *IGNORED),
    )
)
