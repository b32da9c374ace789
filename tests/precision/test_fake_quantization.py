from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.fake_quantization import FakeQuantization, fake_quantize, quantize_gradient

WIDTHS = st.integers(2, 8)
BATCH = torch.arange(24).view(2, 12)


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64)).eval()


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def _weight(seed: int, rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs() + 1  # of one sign
    weight[-1] = 0
    return weight


def _plainly_rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    rounded = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group]
            if symmetric:
                scale = values.abs().max() / (2 ** (bits - 1) - 1)
                codes = torch.round(values / scale) if scale else values
            else:
                least, greatest = min(values.min(), torch.tensor(0.0)), max(values.max(), torch.tensor(0.0))
                scale = (greatest - least) / (2**bits - 1)
                zero = torch.round(-least / scale) if scale else torch.tensor(0.0)
                codes = (torch.round(values / scale) + zero).clamp(0, 2**bits - 1) - zero if scale else values
            rounded[row, start : start + group] = codes * scale
    return rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_like_the_numbers_that_they_are(
    dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    """To the nearest symbol, and once more to what the dtype can hold."""
    weight = _weight(0, 8, 64).to(dtype)
    exact = fake_quantize(weight.float(), bits, symmetric=symmetric)
    rounded = fake_quantize(weight, bits, symmetric=symmetric)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))
    assert torch.equal(quantize_gradient(weight, bits), quantize_gradient(weight.float(), bits).to(dtype))


def test_a_range_that_float16_cannot_hold() -> None:
    wide = torch.tensor([[6e4, -6e4, 1.0]], dtype=torch.float16)
    torch.testing.assert_close(fake_quantize(wide, 8, symmetric=False), wide, rtol=0, atol=240)


@given(WIDTHS, st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_rounded_as_the_formula_says(bits: int, group_size: int, symmetric: bool, seed: int) -> None:
    weight = _weight(seed, 4, 17)
    quantized = fake_quantize(weight, bits, group_size=group_size, symmetric=symmetric)
    torch.testing.assert_close(quantized, _plainly_rounded(weight, bits, group_size, symmetric), rtol=0, atol=0)


@given(WIDTHS, st.booleans(), st.integers(0, 1000))
def test_a_row_has_few_symbols_and_stays_near(bits: int, symmetric: bool, seed: int) -> None:
    weight = _weight(seed, 3, 300)
    quantized = fake_quantize(weight, bits, symmetric=symmetric)
    for row, original in zip(quantized, weight, strict=True):
        assert len(row.unique()) <= 2**bits - symmetric
        step = 2 * original.abs().max() / (2**bits - 2)
        assert (row - original).abs().max() <= step / 2 * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert fake_quantize(torch.randn(3, 8, dtype=dtype), 4).dtype == dtype


@given(WIDTHS, st.booleans())
def test_the_gradient_is_that_at_the_rounded_weight(bits: int, symmetric: bool) -> None:
    weight, input = _weight(1, 5, 8).requires_grad_(), torch.randn(3, 8)
    (input @ fake_quantize(weight, bits, symmetric=symmetric).T).tanh().sum().backward()
    leaf = fake_quantize(weight.detach(), bits, symmetric=symmetric).requires_grad_()
    (input @ leaf.T).tanh().sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, leaf.grad)


@given(WIDTHS)
def test_gradients_are_rounded_per_token(bits: int) -> None:
    gradient = torch.randn(2, 3, 16) * torch.tensor([1e-6, 1.0, 1e3]).view(1, 3, 1)
    rounded = quantize_gradient(gradient, bits)
    scale = gradient.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert torch.equal(rounded, torch.round(gradient / scale) * scale)
    assert not rounded.isnan().any()
    assert torch.equal(quantize_gradient(torch.zeros(2, 3), bits), torch.zeros(2, 3))


def _round_in_place(model: Any, bits: int) -> None:
    """Every linear weight but the output head's, by other means than the layers' forward."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = fake_quantize(module.weight.data, bits)
        elif type(module).__name__ == "Conv1D":
            module.weight.data = fake_quantize(module.weight.data.T, bits).T


@pytest.mark.parametrize("make", [_gpt2, _llama])
@pytest.mark.parametrize("bits", [8, 3])
def test_a_model_computes_and_learns_as_if_its_weights_were_rounded(make: Any, bits: int) -> None:
    model, rounded = make(), make()
    _round_in_place(rounded, bits)
    layers = FakeQuantization(model, bits=bits, backward_bits=None)
    losses = [each(BATCH, labels=BATCH).loss for each in (model, rounded)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, weight), other in zip(model.named_parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)
    assert not any("head" in name for name in layers.names)


def test_backward_at_a_width_rounds_what_comes_to_each_layer() -> None:
    layer = nn.Sequential(nn.Linear(6, 4))
    layers = FakeQuantization(layer, bits=4, backward_bits=2)
    input, gradient = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    layer(input).backward(gradient)
    rounded = quantize_gradient(gradient, 2)
    torch.testing.assert_close(layer[0].weight.grad, rounded.T @ input)
    torch.testing.assert_close(layer[0].bias.grad, rounded.sum(0))
    torch.testing.assert_close(input.grad, rounded @ fake_quantize(layer[0].weight.detach(), 4))
    assert not torch.allclose(rounded, gradient)
    layers.bits = None
    layer.zero_grad()
    layer(input).backward(gradient)
    torch.testing.assert_close(layer[0].bias.grad, gradient.sum(0))


@pytest.mark.parametrize("make", [_gpt2, _llama])
def test_removed_it_was_never_there(make: Any, tmp_path: Any) -> None:
    model = make()
    before, state = model(BATCH).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = FakeQuantization(model, bits=3)
    assert not torch.allclose(model(BATCH).logits, before)
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(BATCH).logits, before)
    with layers.at(None):
        assert torch.equal(model(BATCH).logits, before)
    assert layers.bits == 3
    layers.remove()
    layers.remove()
    assert torch.equal(model(BATCH).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_patterns_choose() -> None:
    layers = FakeQuantization(_gpt2(), modules=["mlp.c_proj", "*.0.attn.*"])
    assert layers.names == (
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.mlp.c_proj",
    )
    assert FakeQuantization(_llama(), modules=["lm_head"]).names == ("lm_head",)


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_is_refused() -> None:
    model = _gpt2()
    for options, message in (
        ({"bits": 1}, "fake quantization has 1 bits"),
        ({"bits": 9}, "from 2 to 8"),
        ({"backward_bits": 16}, "the backward pass has 16 bits"),
        ({"group_size": 0}, "a group of 0 weights: needs at least one"),
        ({"modules": ["gate_proj"]}, "pattern 'gate_proj' matches no linear layer; there are transformer.h.0"),
    ):
        with pytest.raises(PrecisionError, match=message):
            FakeQuantization(model, **options)
    assert not any("forward" in vars(module) for module in model.modules())
    FakeQuantization(model)
    with pytest.raises(PrecisionError, match="has got another forward already: from another FakeQuantization"):
        FakeQuantization(model)
    with pytest.raises(PrecisionError, match="0 is a _Doubled, whose own forward would be lost"):
        FakeQuantization(nn.Sequential(_Doubled(3, 3)))
    with pytest.raises(PrecisionError, match="has no linear layers"):
        FakeQuantization(nn.Sequential(nn.ReLU()))
    with pytest.raises(PrecisionError, match="fake quantization has 1 bits"):
        fake_quantize(torch.zeros(1, 1), 1)


def test_a_quantized_model_is_refused() -> None:
    import bitsandbytes

    with pytest.raises(PrecisionError, match="0 is quantized already"):
        FakeQuantization(nn.Sequential(bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False)))
