"""GPT-2: fused projections stored transposed, learned positions, LayerNorm, a plain MLP."""

from optimum_qguard.encrypt.architectures.family import Family, register
from optimum_qguard.encrypt.layouts import Stacked, ungrouped_heads_of
from optimum_qguard.encrypt.sites import Norm, QueryKey, ValueOutput

ATTENTION = Stacked("attn.c_attn")

register(
    Family(
        ("gpt2",),
        ("transformer.h.", "h."),
        (
            Norm("ln_1", ATTENTION.modules()),
            Norm("ln_2", ("mlp.c_fc",)),
            ValueOutput(ATTENTION, "attn.c_proj"),
            QueryKey(ATTENTION, rotary="none"),
        ),
        # The last two are the causal mask, which old versions of transformers stored.
        ("mlp.c_proj.weight", "mlp.c_proj.bias", "attn.bias", "attn.masked_bias"),
        transposed=True,
        heads=ungrouped_heads_of,
    )
)
