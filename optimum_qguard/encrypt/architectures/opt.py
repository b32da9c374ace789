"""OPT: learned positions, LayerNorm, a ReLU MLP, through which positive factors pass."""

from typing import Any

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Separate, ungrouped_heads_of
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

ATTENTION = Separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def norms_come_first(config: Any) -> bool:
    """In OPT-350M they come after the residual sum, into the residual stream; some models' norms have no weights."""
    return bool(config.do_layer_norm_before and config.layer_norm_elementwise_affine)


def is_relu(config: Any) -> bool:
    return bool(config.activation_function == "relu")


register(
    Family(
        ("opt",),
        ("model.decoder.layers.", "decoder.layers."),
        (
            Norm("self_attn_layer_norm", ATTENTION.modules(), when=norms_come_first),
            Norm("final_layer_norm", ("fc1",), when=norms_come_first),
            ValueOutput(ATTENTION, "self_attn.out_proj"),
            UpDown("fc1", "fc2", when=is_relu),
            QueryKey(ATTENTION, rotary="none"),
        ),
        heads=ungrouped_heads_of,
    )
)
