"""The bit maps that "Step 4" of the paper on switchable precision made by hand (its table 1), for any decoder.

The paper names them only. Which layers have which width follows from the names and from its average bits, which it
takes over modules, not over weights: of GPT-2's twelve blocks with four linear modules each, 5.333 bits are 8 bits in
four blocks and 4 in the others, and 4.667 are 8 bits for eight modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimum_qguard.precision.bitmap import BitMap


@dataclass(frozen=True)
class Names:
    """What a family calls its list of blocks, and linear layers of a block."""

    blocks: str
    qkv: tuple[str, ...]
    attention_output: str
    mlp_output: str


NAMES: Mapping[str, Names] = {
    "gpt2": Names("h", ("attn.c_attn",), "attn.c_proj", "mlp.c_proj"),
    "llama": Names(
        "layers", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "mlp.down_proj"
    ),
}


def hand_made_maps(model: Any) -> dict[str, BitMap]:
    """All ten, by the paper's name, for a model of a family in `NAMES`."""
    names = NAMES[model.config.model_type]
    n_blocks = model.config.num_hidden_layers
    indices, third, sixth = range(n_blocks), round(n_blocks / 3), round(n_blocks / 6)
    return {
        "C1 all8": BitMap({"*": 8}),
        "C2 all4": _at_8(),
        "C3 front8 back4": _at_8(*(f"{names.blocks}.{i}" for i in indices[:third])),
        "C4 back8 front4": _at_8(*(f"{names.blocks}.{i}" for i in indices[-third:])),
        "C5 sandwich": _at_8(*(f"{names.blocks}.{i}" for i in (*indices[:sixth], *indices[-sixth:]))),
        "C6 qkv8 proj4": _at_8(*names.qkv),
        "C7 qkv4 proj8": _at_8(names.attention_output),
        "C8 mlpfc4 mlpproj8": _at_8(names.mlp_output),
        # Norms have no width here: they are at full precision in all maps.
        "C9 layernorm fp32": _at_8(),
        # Not described; here the module that the paper found to matter most, as far as the budget goes.
        "C10 mixed budget": _at_8(*(f"{names.blocks}.{i}.{names.mlp_output}" for i in indices[: 2 * third])),
    }


def _at_8(*patterns: str) -> BitMap:
    """Those at 8 bits, all others at 4."""
    return BitMap({**dict.fromkeys(patterns, 8), "*": 4})
