"""GLM-4: a fused gate, neighbouring dimensions of a part of each head rotated together.

GLM-4-0414 adds norms after attention and MLP, which feed the residual stream and so are no sites.
"""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

SITES = (
    Norm("input_layernorm", ATTENTION.modules()),
    Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ValueOutput(ATTENTION, "self_attn.o_proj"),
    UpDown("mlp.gate_up_proj", "mlp.down_proj", stacked=True),
    QueryKey(ATTENTION, rotary="interleaved", partial=True),
)

register(Family(("glm",), LAYERS, SITES, IGNORED))
register(Family(("glm4",), LAYERS, SITES, ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight", *IGNORED)))
