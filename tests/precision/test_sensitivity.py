"""What a layer's quantization does to the predictions: the definition, computed the long way round."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tokenizer, tiny_model

from optimum_qguard.precision.decoding import decoded
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.sensitivity import GroupSensitivity, Sensitivity, group_modules, measure_sensitivity
from optimum_qguard.precision.suffix import Suffix

TEXT = " ".join(f"w{index * 7 % 512}" for index in range(600))


def sharp(name: str) -> Any:
    """A tiny model whose predictions are worth something."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("name", "groups", "shape"),
    [("llama", ["mlp", "q_proj"], (2, 256)), ("llama-tied", None, (1, 24)), ("gpt2", None, (1, 24))],
)
def test_divergences_are_those_of_the_definition(
    name: str, groups: list[str] | None, shape: tuple[int, int], tokenizer: Any
) -> None:
    model = sharp(name)
    tokens = shape[0] * shape[1]
    found = measure_sensitivity(model, tokenizer, TEXT, tokens=tokens, widths=[2, 8], groups=groups)
    assert found.tokens == tokens
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:tokens]).view(shape)
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        for group in found.groups:
            assert set(group.kl) == {2, 8}
            for width in (2, 8):
                with decoded(model, dict.fromkeys(group.modules, width)):
                    q = model(ids).logits.double().log_softmax(-1)
                expected = float((p.exp() * (p - q)).sum(-1).mean())
                assert group.kl[width] == pytest.approx(expected, rel=1e-3, abs=1e-9)
            assert 0 < group.kl[8] < group.kl[2]


def test_very_large_divergences(tokenizer: Any) -> None:
    model = sharp("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    found = measure_sensitivity(model, tokenizer, TEXT, tokens=32, widths=[2], groups=["mlp"])
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:32])[None]
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        with decoded(model, dict.fromkeys(found.groups[0].modules, 2)):
            q = model(ids).logits.double().log_softmax(-1)
    assert float((p - q).abs().max()) > 100
    assert found.groups[0].kl[2] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_the_model_is_as_it_was(tokenizer: Any) -> None:
    model = sharp("llama").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = model.model.layers
    measure_sensitivity(model, tokenizer, TEXT, tokens=16, widths=[2])
    assert model.training
    assert model.model.layers is layers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pass_from_a_layer_on(name: str) -> None:
    """It computes only the layers from there on, and what the whole model computes."""
    model = sharp(name)
    ids = torch.arange(24).view(2, 12)
    suffix = Suffix(model, ids)
    layers = model.model.layers if name == "llama" else model.transformer.h
    passes: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: passes.append(index))
    suffix.prepare(1)
    passes.clear()
    weight = next(parameter for parameter in layers[1].parameters() if parameter.ndim == 2)
    weight.data.mul_(1.1)
    found = suffix.run(1)
    assert passes == [1]
    with torch.no_grad():
        assert torch.equal(found, model(ids).logits)
    assert not torch.equal(found, suffix.logits)


def test_a_model_that_cannot_begin_in_the_middle_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second layer computes something else where it is the first."""
    model = sharp("llama")
    ids = torch.arange(24).view(2, 12)
    inner, second = model.model, model.model.layers[1]
    forward = type(second).forward

    def by_place(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs) * (2 if inner.layers[0] is second else 1)

    monkeypatch.setattr(type(second), "forward", by_place)
    suffix = Suffix(model, ids)
    suffix.prepare(1)
    second.mlp.up_proj.weight.data.mul_(1.1)
    with torch.no_grad():
        assert torch.equal(suffix.run(1), model(ids).logits)


def test_groups() -> None:
    model = tiny_model("llama")
    assert list(group_modules(model))[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    groups = group_modules(model, ["layers.1.mlp", "mlp", "*.self_attn.*"])
    assert list(groups) == ["*.self_attn.*", "mlp", "layers.1.mlp"]
    assert len(groups["*.self_attn.*"]) == 8
    assert groups["mlp"] == tuple(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down"))
    assert all(".1." in name for name in groups["layers.1.mlp"])


def test_a_stopped_run_goes_on(tokenizer: Any, tmp_path: Path) -> None:
    model = sharp("llama")

    def measure(cache: Path | None, progress: Any = None) -> Sensitivity:
        return measure_sensitivity(model, tokenizer, TEXT, tokens=16, widths=[2, 4], cache=cache, progress=progress)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cache.json", stop)
    assert len(Sensitivity.load(tmp_path / "cache.json").groups) == 5
    told: list[tuple[int, int]] = []
    found = measure(tmp_path / "cache.json", lambda done, total: told.append((done, total)))
    assert told[0] == (6, 14)
    assert found == measure(None) == Sensitivity.load(tmp_path / "cache.json")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(PrecisionError, match="was measured on another model"):
        measure(tmp_path / "cache.json")
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(PrecisionError, match="is no file of measured sensitivities"):
        measure(tmp_path / "cache.json")


def test_predictions_that_are_no_numbers(tokenizer: Any, tmp_path: Path) -> None:
    """They are refused, and not kept in a file that could not be read again."""
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(PrecisionError, match=r"q_proj at 2 bits: the divergence is nan, because predictions on this"):
        measure_sensitivity(model, tokenizer, TEXT, tokens=16, cache=tmp_path / "cache.json")
    assert list(tmp_path.iterdir()) == []


def test_refused(tokenizer: Any) -> None:
    model = tiny_model("llama")
    for says, options in (
        ("the text has 3 token", {"text": "w1 w2 w3", "tokens": 8}),
        ("widths has 9 bits", {"widths": [9]}),
        ("no width to measure", {"widths": []}),
        ("matches no module", {"groups": ["typo"]}),
        ("which 48 does not divide", {"group_size": 48}),
        ("mapping is 'square'", {"mapping": "square"}),
    ):
        with pytest.raises(PrecisionError, match=says):
            measure_sensitivity(model, tokenizer, **{"text": TEXT, "tokens": 16, **options})


@given(st.dictionaries(st.integers(2, 8), st.floats(0, 100), min_size=1))
def test_curves_pass_through_what_was_measured_and_never_rise(kl: dict[int, float]) -> None:
    curve = GroupSensitivity(name="a", modules=("a",), weights=1, kl=kl).curve()
    assert list(curve) == list(range(2, 9))
    assert all(curve[width] >= curve[width + 1] for width in range(2, 8))
    for width, value in kl.items():
        largest = max([value, 1e-12, *(other for at, other in kl.items() if at > width)])
        assert curve[width] >= largest * (1 - 1e-9)


def test_interpolation() -> None:
    curve = GroupSensitivity(name="a", modules=("a",), weights=1, kl={3: 0.4, 4: 0.1, 6: 0.001}).curve()
    assert curve[2] == pytest.approx(1.6)
    assert curve[3] == pytest.approx(0.4)
    assert curve[5] == pytest.approx(math.sqrt(0.1 * 0.001))
    assert curve[8] == pytest.approx(0.001 / 16)
