import json
from pathlib import Path
from typing import Any

import pytest

from optimum_qguard.formats import WeightError, get_format
from optimum_qguard.formats.gguf_mixture import FILE_TYPES, ModelShape, file_type, gguf_name, tensor_type

MIXTURES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "llama_cpp_mixtures.json").read_text())


@pytest.mark.parametrize("model", MIXTURES["models"], ids=lambda model: str(sorted(model["shape"].values(), key=str)))
@pytest.mark.parametrize("file", FILE_TYPES)
def test_every_tensor_gets_the_type_that_llama_cpp_gave_it(model: dict[str, Any], file: str) -> None:
    shape = ModelShape(**model["shape"])
    for name, runs in model["types"][file].items():
        kinds = [kind for run in runs.split() for kind in [run.split("*")[1]] * int(run.split("*")[0])]
        assert len(kinds) == (shape.layers if "{}" in name else 1)
        for layer, kind in enumerate(kinds):
            expected = None if kind == "None" else f"gguf-{kind}"
            assert tensor_type(file, name.format(layer), tuple(model["tensors"][name]), shape) == expected, name


def test_every_default_type_is_a_format() -> None:
    for kind in FILE_TYPES.values():
        get_format(f"gguf-{kind}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.13.mlp.down_proj.weight", "blk.13.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.layers.7.self_attn.q_proj.bias", "blk.7.attn_q.bias"),
        ("model.layers.2.input_layernorm.weight", "blk.2.attn_norm.weight"),
        ("model.layers.1.mlp.gate.weight", "blk.1.ffn_gate_inp.weight"),
        ("model.layers.13.mlp.experts.11.down_proj.weight", "blk.13.ffn_down_exps.weight"),
        ("model.layers.1.block_sparse_moe.experts.7.w2.weight", "blk.1.ffn_down_exps.weight"),
        ("model.layers.1.mlp.experts.down_proj", "blk.1.ffn_down_exps.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("transformer.h.3.attn.c_attn.weight", "blk.3.attn_qkv.weight"),
        ("h.3.mlp.c_proj.weight", "blk.3.ffn_down.weight"),
        ("gpt_neox.layers.4.attention.dense.weight", "blk.4.attn_output.weight"),
        ("something.else.weight", None),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    pytest.importorskip("gguf")
    assert gguf_name(name) == expected


@pytest.mark.parametrize(
    "name", ["blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias", "position_embd.weight"]
)
def test_what_llama_cpp_never_quantizes(name: str) -> None:
    assert tensor_type("q4_k_m", name, (256, 256), ModelShape(layers=2)) is None


def test_a_vector_is_not_quantized() -> None:
    assert tensor_type("q4_0", "blk.0.attn_q.weight", (256,), ModelShape(layers=2)) is None


def test_odd_columns() -> None:
    model = ModelShape(layers=2)
    assert tensor_type("q4_k_m", "blk.0.attn_q.weight", (8, 100), model) is None
    with pytest.raises(WeightError, match="refuses"):
        tensor_type("q4_0", "blk.0.attn_q.weight", (8, 100), model)


def test_file_type_names() -> None:
    assert file_type("gguf-Q4_K_M") == file_type("Q4_K") == "q4_k_m"
    with pytest.raises(ValueError, match=r"unknown GGUF file type 'q9'; known: q4_0, .*q6_k"):
        file_type("q9")
