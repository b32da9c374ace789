"""StableLM: Llama's layers with LayerNorm and heads rotated in part.

StableLM 2 12B has attention and MLP side by side behind one norm, and a norm per head for queries and keys.
"""

from typing import Any

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.architectures.llama import ATTENTION, IGNORED, LAYERS
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

MLP = ("mlp.gate_proj", "mlp.up_proj")


def parallel(config: Any) -> bool:
    return bool(config.use_parallel_residual)


def one_after_the_other(config: Any) -> bool:
    return not config.use_parallel_residual


register(
    Family(
        ("stablelm",),
        LAYERS,
        (
            Norm("input_layernorm", (*ATTENTION.modules(), *MLP), when=parallel),
            Norm("input_layernorm", ATTENTION.modules(), when=one_after_the_other),
            Norm("post_attention_layernorm", MLP, when=one_after_the_other),
            ValueOutput(ATTENTION, "self_attn.o_proj"),
            UpDown("mlp.up_proj", "mlp.down_proj"),
            QueryKey(
                ATTENTION,
                partial=True,
                query_norm="self_attn.q_layernorm.norms.*",
                key_norm="self_attn.k_layernorm.norms.*",
            ),
        ),
        IGNORED,
    )
)
