"""Nested models compute what plain models with the decoded weights compute."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from optimum_qguard.precision import BitMap, PrecisionError, bits, nest, nested_codes, random_bits, set_bits
from optimum_qguard.precision.linears import linear_layers, output_head
from optimum_qguard.precision.nested import NestedLinear, nested_layers

INPUTS: dict[str, dict[str, Any]] = {
    "bert": {"input_ids": torch.arange(8)[None]},
    "gpt2": {"input_ids": torch.arange(8)[None]},
    "llama": {"input_ids": torch.arange(8)[None]},
    "llama-tied": {"input_ids": torch.arange(8)[None]},
    "t5": {"input_ids": torch.arange(8)[None], "decoder_input_ids": torch.arange(4)[None]},
    "vit": {"pixel_values": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
}


def decoded(model: PreTrainedModel, nested: PreTrainedModel, width: int) -> PreTrainedModel:
    """A copy of the plain model with the values of a width."""
    plain = copy.deepcopy(model)
    for name, layer in nested_layers(nested).items():
        module = plain.get_submodule(name)
        values = layer.dequantize(width).to(layer.dtype)
        module.weight.data = values if isinstance(module, nn.Linear) else values.T
    return plain


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_forward_at_every_width(name: str) -> None:
    model = tiny_model(name)
    nested = nest(copy.deepcopy(model))
    assert set(nested_layers(nested)) == {
        name for name, module in linear_layers(model).items() if module is not output_head(model)
    }
    for width in (8, 5, 2):
        set_bits(nested, width)
        torch.testing.assert_close(nested(**INPUTS[name]).logits, decoded(model, nested, width)(**INPUTS[name]).logits)


@torch.no_grad()
def test_bfloat16() -> None:
    model = tiny_model("llama", torch.bfloat16)
    nested = nest(copy.deepcopy(model), 4)
    expected = decoded(model, nested, 4)(**INPUTS["llama"]).logits
    assert torch.equal(nested(**INPUTS["llama"]).logits, expected)


def test_casting_the_model_changes_no_code() -> None:
    nested = nest(tiny_model("llama"), 4)
    layer = next(iter(nested_layers(nested).values()))
    before = layer.dequantize(3)
    nested.half().float()
    assert torch.equal(layer.dequantize(3), before)


def test_gradients_reach_the_input_and_the_bias() -> None:
    model = tiny_model("gpt2")
    nested = nest(copy.deepcopy(model), 4)
    gradients = []
    for each in (nested, decoded(model, nested, 4)):
        embeddings = each.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append((embeddings.grad, each.get_submodule("transformer.h.0.attn.c_attn").bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradients_of_a_single_vector() -> None:
    layer = nn.Sequential(nn.Linear(16, 4))
    nested = nest(copy.deepcopy(layer))
    layer[0].weight.data = nested[0].dequantize(8)
    gradients = []
    for each in (layer, nested):
        given = torch.arange(16.0).requires_grad_()
        each(given).square().sum().backward()
        gradients.append((given.grad, each[0].bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_layer_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, gradients and their gradients are those of a linear layer with the decoded weight."""
    monkeypatch.setattr(nested_codes, "_TILE", 7 * 32)
    layer = nest(nn.Sequential(nn.Linear(32, 50)), 3)[0]
    input = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for output in (layer(input), nn.functional.linear(input, layer.weight, layer.bias)):
        gradients = torch.autograd.grad(output.square().sum(), (input, layer.bias), create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].square().sum(), input)
        found.append((output, *gradients, second))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_nothing_decoded_waits_for_the_backward_pass() -> None:
    layer = nest(nn.Sequential(nn.Linear(64, 64)), 4)[0]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert kept
    assert all(any(tensor.data_ptr() == held.data_ptr() for held in layer.buffers()) for tensor in kept)


def test_the_backward_pass_has_the_width_of_the_forward() -> None:
    layer = nest(nn.Sequential(nn.Linear(32, 32)), 8)[0]
    input = torch.randn(3, 32, requires_grad=True)
    model = nn.Sequential(layer)
    with bits(model, 2):
        output = layer(input)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    torch.testing.assert_close(gradient, layer.dequantize(2).sum(0).expand(3, 32))


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    plain = copy.deepcopy(model)
    layer = nest(model, 4)[0]
    plain[0].weight.data = layer.weight
    input = torch.randn(3, 32, requires_grad=True)
    found = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(input)
        found.append((output, *torch.autograd.grad(output.float().sum(), input)))
    assert found[0][0].dtype == found[1][0].dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.02, atol=0.02)  # theirs are in BF16


def test_memory() -> None:
    model = nest(tiny_model("llama"), group_size=64)
    for layer in nested_layers(model).values():
        weights = layer.in_features * layer.out_features
        held = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert held == weights + 4 * weights // 64 + 28 * layer.out_features
        assert not list(layer.parameters())


def test_bit_map() -> None:
    model = nest(tiny_model("llama"), BitMap({"layers.0": None, "*.down_proj": 8, "*": 4}))
    layers = nested_layers(model)
    assert {name: layer.bits for name, layer in layers.items() if "mlp" in name} == {
        "model.layers.1.mlp.gate_proj": 4,
        "model.layers.1.mlp.up_proj": 4,
        "model.layers.1.mlp.down_proj": 8,
    }
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    head = nest(tiny_model("llama"), {"lm_head": 8})
    assert list(nested_layers(head)) == ["lm_head"]


def test_a_layer_in_two_places() -> None:
    inner = nn.Linear(32, 32)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    plain = copy.deepcopy(model)
    nest(model)
    assert model[0] is model[2]
    assert isinstance(model[0], NestedLinear)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model(x), plain(x), atol=0.05, rtol=0)


def test_a_pickled_model_has_one_width_for_a_forward() -> None:
    """As torch.save and the libraries that start processes write it."""
    model = nest(tiny_model("llama"))
    copied = pickle.loads(pickle.dumps(model))
    with random_bits(copied, (2, 8)) as draws:
        copied(torch.arange(8)[None])
    assert len(draws) == 1
    set_bits(copied, 3)
    assert nested_layers(model)["model.layers.0.mlp.up_proj"].bits == 8
    assert "input_ids" in inspect.signature(copied.forward).parameters


def test_a_copy_has_a_switch_of_its_own() -> None:
    model = nest(tiny_model("llama"))
    twin = copy.deepcopy(model)
    set_bits(twin, 2)
    one, other = (model(**INPUTS["llama"]).logits, twin(**INPUTS["llama"]).logits)
    assert not torch.allclose(one, other)
    with bits(model, 2):
        assert torch.equal(model(**INPUTS["llama"]).logits, other)


@pytest.mark.parametrize("width", [0, 1, 9, True, 4.0])
def test_width_out_of_range(width: Any) -> None:
    with pytest.raises(PrecisionError, match="a width is a whole number from 2 to 8"):
        nest(tiny_model("llama"), {"*": width})


def test_nested_already() -> None:
    with pytest.raises(PrecisionError, match="nested already; use set_bits"):
        nest(nest(tiny_model("llama")))


def test_nothing_to_nest() -> None:
    with pytest.raises(PrecisionError, match="no linear layers"):
        nest(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(PrecisionError, match="nothing to nest"):
        nest(tiny_model("llama"), {"*": None})


def test_unknown_pattern() -> None:
    with pytest.raises(PrecisionError, match="'nope' matches no module"):
        nest(tiny_model("llama"), {"nope": 4})


@pytest.mark.parametrize(
    ("name", "widths", "message"),
    [
        ("llama", {"embed_tokens": 4}, "gives a width to model.embed_tokens, which is a Embedding: only linear layers"),
        ("llama", {"input_layernorm": 4}, "only linear layers can have one"),
        ("vit", {"patch_embeddings.projection": 4}, "which is a Conv2d: only linear layers can have one"),
        ("mixtral", {"*": 4}, "experts' weights are fused into one tensor, which is not supported"),
        ("llama-tied", {"lm_head": 4}, "one and the same tensor"),
    ],
)
def test_layers_that_cannot_be_nested(name: str, widths: dict[str, int], message: str) -> None:
    model = tiny_model(name)
    with pytest.raises(PrecisionError, match=message):
        nest(model, widths)
    assert not nested_layers(model)


def test_one_module_in_two_places_with_two_widths() -> None:
    inner = nn.Linear(32, 32)
    with pytest.raises(PrecisionError, match=r"one and the same tensor, but would have different widths: 4 and 8"):
        nest(nn.Sequential(inner, nn.ReLU(), inner), {"0": 4, "2": 8})


def test_rows_that_cannot_be_divided() -> None:
    model = nn.Sequential(nn.Linear(64, 131), nn.Linear(131, 8))
    with pytest.raises(PrecisionError, match="1: 131 input features have no divisor from 16 to the group size 128"):
        nest(model)
    assert not nested_layers(model)
    assert nest(model, group_size=None)[1].grid.shape == (2, 8, 1)


def test_shared_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    with pytest.raises(PrecisionError, match=r"0\.weight and 1\.weight are one and the same tensor"):
        nest(model)


def test_quantized_already() -> None:
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(nn.Linear(32, 32))
    quantize(model, weights=qint8)
    freeze(model)
    with pytest.raises(PrecisionError, match="0 is quantized already"):
        nest(model)


def test_a_layer_that_computes_something_of_its_own() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(PrecisionError, match="0 is a Scaled, which computes something of its own"):
        nest(nn.Sequential(Scaled(32, 32)))


def test_patched_forward() -> None:
    model = tiny_model("llama")
    model.lm_head.forward = model.lm_head.forward
    nest(model)
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.forward = other.model.layers[1].mlp.up_proj.forward
    with pytest.raises(PrecisionError, match=r"layers\.1\.mlp\.up_proj has a forward that was put in place"):
        nest(other)


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_group_size_that_makes_no_sense(size: Any) -> None:
    with pytest.raises(PrecisionError, match="group_size is"):
        nest(tiny_model("llama"), group_size=size)


def test_weights_that_are_not_finite() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PrecisionError, match=r"model\.layers\.1\.mlp\.up_proj: weights that are not finite"):
        nest(model)
    # As it was: none of the layers before it is nested.
    assert not nested_layers(model)
