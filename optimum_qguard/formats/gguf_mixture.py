"""Which GGUF type llama.cpp gives each tensor of a file type such as Q4_K_M: the mixture of a ``llama-quantize`` run.

A file type names a default; llama.cpp spends more bits on some tensors (attention values, the MLP's down projection in
the first and last layers, the output head), falls back where the columns do not fit, and leaves norms, routers and
position embeddings as they are.

    >>> model = ModelShape(layers=30, heads_per_kv=3, tied_embeddings=True)
    >>> tensor_type("q4_k_m", "blk.0.ffn_down.weight", (576, 1536), model)
    'gguf-q6_k'
    >>> tensor_type("q4_k_m", "blk.0.attn_q.weight", (576, 576), model)
    'gguf-q5_0'

Without an importance matrix, an explicit ``--tensor-type`` or ``--pure``. Source: ``llama_tensor_get_type_impl``,
``tensor_type_fallback`` and ``tensor_allows_quantization`` in src/llama-quant.cpp, ggml-org/llama.cpp at 007dbbf.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from optimum_qguard.formats.gguf import fallback_for

FILE_TYPES = {
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q8_0": "q8_0",
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "iq4_nl": "iq4_nl",
}
"""The known file types and their default types. Not Q2_K_S, which llama.cpp makes with an importance matrix only."""

_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_NEVER = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv"
    r"|indexer\.[kq]_proj|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b"
    r"|^position_embd|^token_types"
)


@dataclass(frozen=True)
class ModelShape:
    """What the mixture depends on besides a tensor's name.

    Attributes:
        layers: number of transformer blocks (each with attention: hybrids count their attention layers differently).
        heads_per_kv: query heads per key-value head.
        experts: experts per layer, 0 for a dense model.
        tied_embeddings: whether the token embedding is the output head as well.
        falcon: the Falcon architecture, which has rules of its own.
    """

    layers: int
    heads_per_kv: int = 1
    experts: int = 0
    tied_embeddings: bool = False
    falcon: bool = False


def file_type(name: str) -> str:
    """The canonical name of a file type: lower case, without ``gguf-``, ``q4_k`` for what llama.cpp calls Q4_K_M.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    key = name.lower().removeprefix("gguf-")
    key = _ALIASES.get(key, key)
    if key not in FILE_TYPES:
        raise ValueError(f"unknown GGUF file type {name!r}; known: {', '.join(FILE_TYPES)}")
    return key


def tensor_type(file: str, name: str, shape: tuple[int, ...], model: ModelShape) -> str | None:
    """The format (``"gguf-q6_k"``) that llama.cpp gives a tensor, or ``None`` where it leaves it unquantized.

    Args:
        file: a file type, see `file_type`.
        name: the tensor's name in a GGUF file; `gguf_name` finds it.
        shape: as PyTorch writes it, the input features last.

    Raises:
        ValueError: unknown file type.
        WeightError: columns that llama.cpp refuses.
    """
    file = file_type(file)
    if len(shape) < 2 or not name.endswith("weight") or _NEVER.search(name):
        return None
    kind = _kind(file, name, shape[-1], model)
    return fallback_for(f"gguf-{kind}", shape[-1])


def gguf_name(name: str) -> str | None:
    """The name in a GGUF file of a tensor of a Hugging Face checkpoint, by the gguf package's own tables.

        >>> gguf_name("model.layers.3.mlp.down_proj.weight")
        'blk.3.ffn_down.weight'

    Experts that a checkpoint keeps apart share one name. ``None`` for a tensor that the tables do not have.

    Raises:
        ImportError: the gguf package is missing.
    """
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, suffix = name, "weight"
    stem = re.sub(r"\.experts\.\d+\.", ".experts.", stem)
    layer = re.search(r"\.(\d+)\.", f".{stem}.")
    pattern = stem if layer is None else re.sub(r"(^|\.)\d+\.", r"\g<1>{bid}.", stem, count=1)
    template = _name_table().get(pattern)
    if template is None:
        return None
    return f"{template.format(bid=None if layer is None else layer[1])}.{suffix}"


@cache
def _name_table() -> dict[str, str]:
    try:
        from gguf.constants import TENSOR_NAMES
        from gguf.tensor_mapping import TensorNameMap
    except ImportError as error:
        raise ImportError("GGUF's tensor names need gguf: pip install 'optimum-qguard[gguf]'") from error
    table: dict[str, str] = {}
    for tensors in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg):
        for tensor, names in tensors.items():
            for name in names:
                template = TENSOR_NAMES[tensor]
                # Few names mean different tensors in different models; the ordinary one of an MLP is the rule.
                if name not in table or template in ("blk.{bid}.ffn_down", "blk.{bid}.ffn_up"):
                    table[name] = template
    return table


def _kind(file: str, name: str, columns: int, model: ModelShape) -> str:
    default = FILE_TYPES[file]
    if name == "output.weight" or (model.tied_embeddings and _is_token_embedding(name)):
        fits = columns % (256 if default.endswith("k") else 32) == 0
        return "q8_0" if default == "q8_0" or model.falcon or not fits else "q6_k"
    if _is_token_embedding(name):
        return default
    layer = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", name)) else 0
    if re.search(r"attn_(v|qkv|kv_b)\.weight", name):
        return _attention_value(file, default, layer, model)
    if "attn_k.weight" in name:
        return "q8_0" if model.experts == 8 else default
    if "attn_q.weight" in name:
        return default
    if "attn_output.weight" in name:
        return _attention_output(file, default, model)
    if "ffn_down" in name:
        return _down(file, default, layer, model)
    return default


def _is_token_embedding(name: str) -> bool:
    return name in ("token_embd.weight", "per_layer_token_embd.weight")


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _attention_value(file: str, default: str, layer: int, model: ModelShape) -> str:
    if model.experts == 8:
        return "q8_0"
    kind = default
    if file == "q2_k":
        kind = "q4_k" if model.heads_per_kv >= 4 else "q3_k"
    elif file == "q3_k_m":
        kind = "q5_k" if layer < 2 else "q4_k"
    elif file == "q3_k_l" or (file == "q4_k_s" and layer < 4):
        kind = "q5_k"
    elif file in ("q4_k_m", "q5_k_m") and _more_bits(layer, model.layers):
        kind = "q6_k"
    elif file == "iq4_nl" and model.heads_per_kv >= 4:
        kind = "q5_k"
    is_70b = model.layers == 80 and model.heads_per_kv > 1
    return "q5_k" if is_70b and kind in ("q3_k", "q4_k") else kind


def _attention_output(file: str, default: str, model: ModelShape) -> str:
    if model.falcon:
        return "q4_k" if file == "q3_k_l" else default
    if model.experts == 8:
        return "q5_k" if file in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl") else default
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(file, default)


def _down(file: str, default: str, layer: int, model: ModelShape) -> str:
    more = _more_bits(layer, model.layers)
    if file == "q2_k":
        return "q3_k"
    if file == "q3_k_m":
        if layer < model.layers // 16:
            return "q5_k"
        return "q4_k" if not model.falcon or more else "q3_k"
    if file == "q3_k_l":
        return "q4_k" if model.falcon else "q5_k"
    if file == "q4_k_m" and model.falcon:
        return "q6_k" if layer < model.layers // 16 else "q5_k" if more else "q4_k"
    if file in ("q4_k_m", "q5_k_m") and more:
        return "q6_k"
    if (file == "iq4_nl" or (file == "q4_k_s" and not model.falcon)) and layer < model.layers // 8:
        return "q5_k"
    return default
