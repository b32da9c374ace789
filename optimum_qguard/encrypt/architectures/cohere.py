"""Command R: attention and gated MLP side by side behind one norm, neighbouring dimensions rotated together.

Command R+ norms queries and keys with a weight for each head. Some layers of Cohere 2 do not rotate, for which pairs
are only more than needed.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

register(
    Family(
        ("cohere", "cohere2"),
        LAYERS,
        (
            Norm("input_layernorm", (*ATTENTION.modules(), "mlp.gate_proj", "mlp.up_proj")),
            ValueOutput(ATTENTION, "self_attn.o_proj"),
            UpDown("mlp.up_proj", "mlp.down_proj"),
            QueryKey(ATTENTION, rotary="interleaved", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        ),
        IGNORED,
    )
)
