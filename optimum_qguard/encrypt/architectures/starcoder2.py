"""StarCoder 2: Llama's attention with biases, LayerNorm, a plain MLP."""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

register(
    Family(
        ("starcoder2",),
        LAYERS,
        (
            Norm("input_layernorm", ATTENTION.modules()),
            Norm("post_attention_layernorm", ("mlp.c_fc",)),
            ValueOutput(ATTENTION, "self_attn.o_proj"),
            QueryKey(ATTENTION),
        ),
        ("mlp.c_proj.weight", "mlp.c_proj.bias", *IGNORED),
    )
)
