"""BLOOM: fused projections by head, positions by ALiBi, LayerNorm, a plain MLP."""

from typing import Any

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Grouped, ungrouped_heads_of
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

ATTENTION = Grouped("self_attention.query_key_value")


def norms_stay_inside(config: Any) -> bool:
    """The residual stream may continue from the norm's output instead of its input."""
    return not config.apply_residual_connection_post_layernorm


register(
    Family(
        ("bloom",),
        ("transformer.h.", "h."),
        (
            Norm("input_layernorm", ATTENTION.modules(), when=norms_stay_inside),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",), when=norms_stay_inside),
            ValueOutput(ATTENTION, "self_attention.dense"),
            QueryKey(ATTENTION, rotary="none"),
        ),
        ("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
        heads=ungrouped_heads_of,
    )
)
