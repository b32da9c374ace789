"""Weights at a width for a while: what inference would see, and then exactly the original again."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.decoding import decoded, width_format
from optimum_qguard.precision.errors import PrecisionError


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_compute_with_decoded_values_for_a_while(name: str) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    widths = BitMap({"0": 3, "*": None}).resolve(model)
    with decoded(model, widths):
        for key, value in model.state_dict().items():
            if widths.get(key.removesuffix(".weight")) is None:
                assert torch.equal(value, before[key])
                continue
            transposed = name == "gpt2"
            weight = before[key].T if transposed else before[key]
            expected = width_format(3).quantize(weight).dequantize()
            assert torch.equal(value.T if transposed else value, expected)
            assert not torch.equal(value, before[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError), decoded(model, BitMap({"*": 2}).resolve(model)):
        raise KeyError
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with (
        pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight: 1 NaN"),
        decoded(model, BitMap({"*": 2}).resolve(model)),
    ):
        pass
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[key], before[key])


def test_shared_weights_are_quantized_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 8), "b": nn.Linear(32, 8)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    with decoded(model, {"a": 3, "b": 3}):
        assert torch.equal(model["b"].weight, width_format(3).quantize(before).dequantize())
    assert torch.equal(model["a"].weight, before)


def test_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PrecisionError, match="no linear layer lm"), decoded(model, {"lm": 3}):
        pass
    with pytest.raises(PrecisionError, match="which 48 does not divide"), decoded(model, {"lm_head": 3}, group_size=48):
        pass
    for arguments in ((1,), (4, 0), (4, 32, "affine")):
        with pytest.raises(PrecisionError):
            width_format(*arguments)
