"""Every way in which transformers loads a model."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import transformers
from libraries import library_config, library_format
from loaded import assert_guarded_exactly, quantized_tensors
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, save_tokenizer, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from optimum_qguard import QGuardConfig, QGuardInt8Config, QGuardNF4Config
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.noise import half_width

Saved = Callable[[str], Path]
AUTO = {
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}


def load(folder: Path, config: Any, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that `save_pretrained` writes, bytes of quantized tensors included."""
    return {name: value.view(torch.uint8) for name, value in model.state_dict().items() if value.numel()}


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("library", ["bnb-int8", "bnb-nf4", "torchao-int8", "quanto-int4"])
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"gpt2"}))
def test_architectures(saved: Saved, name: str, library: str) -> None:
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    model = auto.from_pretrained(saved(name), quantization_config=QGuardConfig(library_config(library)))
    assert type(model).__name__ == CONFIGS[name][0]
    assert_guarded_exactly(model, saved(name))


def test_experts_stay_in_full_precision_and_are_not_guarded(saved: Saved) -> None:
    """transformers merges experts into 3-D parameters, which none of the libraries quantizes on load."""
    model = load(saved("mixtral"), QGuardInt8Config())
    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(model.named_parameters())
    assert not any("experts" in tensor.name for tensor in model.qguard_report.tensors)
    assert len(model.qguard_report.tensors) == 8


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_headless_model_has_names_of_its_own(saved: Saved, name: str) -> None:
    model = AutoModel.from_pretrained(saved(name), quantization_config=QGuardInt8Config())
    names = {tensor.name for tensor in model.qguard_report.tensors}
    assert names <= dict(model.named_parameters()).keys()
    assert names == quantized_tensors(model)


def test_a_head_that_is_new_is_left_as_transformers_leaves_it(saved: Saved) -> None:
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(saved("llama"), quantization_config=QGuardNF4Config())
    assert len(model.qguard_report.tensors) == 14
    assert not any("score" in tensor.name for tensor in model.qguard_report.tensors)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None], ids=str)
def test_device_map(tiny_llama: Path, device_map: Any) -> None:
    assert_guarded_exactly(load(tiny_llama, QGuardInt8Config(), device_map=device_map), tiny_llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"], ids=str)
def test_dtype(tiny_llama: Path, dtype: Any) -> None:
    model = load(tiny_llama, QGuardNF4Config(), dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert_guarded_exactly(model, tiny_llama)


def test_tied_weights(saved: Saved) -> None:
    model = load(saved("llama-tied"), QGuardInt8Config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_guarded_exactly(model, saved("llama-tied"))


def test_a_tied_head_is_guarded_if_it_is_quantized(saved: Saved) -> None:
    model = load(saved("llama-tied"), QGuardInt8Config(llm_int8_skip_modules=[]))
    assert {tensor.name for tensor in model.qguard_report.tensors} == quantized_tensors(model)


def test_shards_and_their_order_do_not_matter(saved: Saved, tmp_path: Path) -> None:
    whole, shards = load_file(saved("llama") / "model.safetensors"), tmp_path / "shards"
    tiny_model("llama").save_pretrained(shards, max_shard_size="200KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    backwards = tmp_path / "backwards"
    tiny_model("llama").config.save_pretrained(backwards)
    names = sorted(whole, reverse=True)
    index = {name: f"model-{position % 3 + 1:05d}-of-00003.safetensors" for position, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: whole[name] for name in names if index[name] == file}, backwards / file, {"format": "pt"})
    (backwards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    for config in (QGuardInt8Config(seed=5), QGuardNF4Config(seed=5, method="gaussian", noise="global")):
        one = load(saved("llama"), config)
        for other in (shards, backwards):
            assert_same_weights(one, load(other, config))


def test_threads_do_not_matter(saved: Saved) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = load(saved("llama"), QGuardNF4Config(seed=5))
        torch.set_num_threads(4)
        assert_same_weights(one, load(saved("llama"), QGuardNF4Config(seed=5)))
    finally:
        torch.set_num_threads(threads)


def test_the_default_seed_is_fresh_and_its_record_repeats_the_load(tiny_llama: Path) -> None:
    one, other = load(tiny_llama, QGuardInt8Config()), load(tiny_llama, QGuardInt8Config())
    assert one.qguard_report.fresh_seed
    assert one.qguard_report.seed != other.qguard_report.seed
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights(one)[name], weights(other)[name])
    again = load(tiny_llama, QGuardInt8Config(seed=one.qguard_report.seed))
    assert not again.qguard_report.fresh_seed
    assert again.qguard_report.seed == one.qguard_report.seed
    assert_same_weights(one, again)


def test_one_configuration_guards_two_loads_differently(tiny_llama: Path) -> None:
    config = QGuardInt8Config()
    before = config.to_dict()
    assert load(tiny_llama, config).qguard_report.seed != load(tiny_llama, config).qguard_report.seed
    assert config.to_dict() == before


def test_tensors_of_equal_weights_get_different_noise(saved: Saved, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path)
    guarded = weights(load(tmp_path, QGuardInt8Config(seed=1)))
    first, second = (guarded[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("library", ["bnb-int8", "bnb-nf4", "torchao-int4", "quanto-float8"])
def test_per_layer_amplitude_is_each_tensors_median_half_width(saved: Saved, library: str) -> None:
    config = QGuardConfig(library_config(library), method="gaussian", multiplier=0.5)
    model = load(saved("llama"), config)
    full = load_file(saved("llama") / "model.safetensors")
    for tensor in model.qguard_report.tensors:
        expected = library_format(library).quantize(full[tensor.name]).half_widths().flatten().median()
        assert tensor.amplitude == pytest.approx(0.5 * float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_global_amplitude_is_the_median_over_tensors(saved: Saved, name: str) -> None:
    per_layer = load(saved(name), QGuardInt8Config(method="gaussian"))
    model = load(saved(name), QGuardInt8Config(method="uniform", noise="global", multiplier=2.0))
    expected = 2 * median(tensor.amplitude for tensor in per_layer.qguard_report.tensors)
    (amplitude,) = {tensor.amplitude for tensor in model.qguard_report.tensors}
    assert amplitude == pytest.approx(expected, rel=1e-5)
    assert_guarded_exactly(model, saved(name))


def test_fixed_amplitude(saved: Saved) -> None:
    report = load(saved("llama"), QGuardInt8Config(noise=1e-3, multiplier=3)).qguard_report
    assert {(tensor.method, tensor.amplitude) for tensor in report.tensors} == {("gaussian", 3e-3)}


def test_no_noise_is_plain_quantization(saved: Saved) -> None:
    model = load(saved("llama"), QGuardInt8Config(noise=0.0))
    assert model.qguard_report.share_changed == 0
    assert_same_weights(model, load(saved("llama"), library_config("bnb-int8")))


@pytest.mark.parametrize(("method", "expected"), [("stochastic", 0.25), ("gaussian", 0.39), ("uniform", 0.25)])
def test_share_of_changed_symbols(saved: Saved, method: str, expected: float) -> None:
    """Closed forms for residuals uniform in cells of one width; rows of different scales blur it by a point."""
    report = load(saved("llama"), QGuardInt8Config(method=method)).qguard_report
    assert report.share_changed == pytest.approx(expected, abs=0.015)


def test_global_noise_needs_files_to_read_twice(tiny_llama: Path) -> None:
    state, config = tiny_model("llama").state_dict(), tiny_model("llama").config
    guard = QGuardInt8Config(noise="global")
    with pytest.raises(QGuardConfigError, match=r"^noise='global' reads the checkpoint twice[^\n]*$"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, quantization_config=guard)


def test_half_widths_follow_the_transposed_weight(saved: Saved) -> None:
    model = load(saved("gpt2"), QGuardInt8Config(method="gaussian"))
    full = load_file(saved("gpt2") / "model.safetensors")
    for tensor in model.qguard_report.tensors:
        weight = full[tensor.name.removeprefix("transformer.")] if tensor.name not in full else full[tensor.name]
        assert tensor.amplitude == pytest.approx(half_width(weight.T, library_format("bnb-int8"), "w"), rel=1e-5)


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def test_text_generation_pipeline(with_tokenizer: Path) -> None:
    generator = pipeline(
        "text-generation",
        model=str(with_tokenizer),
        tokenizer=AutoTokenizer.from_pretrained(with_tokenizer),
        model_kwargs={"quantization_config": QGuardInt8Config(seed=1)},
    )
    assert len(generator.model.qguard_report.tensors) == 14
    text = generator("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert len(text.split()) > 3


def test_a_plain_dict(tiny_llama: Path) -> None:
    config = QGuardNF4Config(seed=3, bnb_4bit_use_double_quant=True)
    by_dict = load(tiny_llama, json.loads(config.to_json_string()))
    assert_same_weights(by_dict, load(tiny_llama, config))
    minimal = {"quant_method": "qguard", "quantization_config": {"load_in_8bit": True}}
    assert len(load(tiny_llama, minimal).qguard_report.tensors) == 14


@torch.no_grad()
def test_generation_works_and_is_close_to_full_precision(saved: Saved) -> None:
    tokens = torch.arange(5, 25).unsqueeze(0)
    full = AutoModelForCausalLM.from_pretrained(saved("llama"))(tokens).logits
    guarded = load(saved("llama"), QGuardInt8Config(seed=1))
    assert float((guarded(tokens).logits - full).norm() / full.norm()) < 0.1
    assert guarded.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_the_model_is_the_librarys_own(tiny_llama: Path) -> None:
    plain, guarded = load(tiny_llama, library_config("bnb-int8")), load(tiny_llama, QGuardInt8Config())
    assert type(guarded.hf_quantizer) is type(plain.hf_quantizer)
    assert vars(guarded.hf_quantizer).keys() == vars(plain.hf_quantizer).keys()
    assert guarded.config.quantization_config.to_dict() == plain.config.quantization_config.to_dict()
    assert [type(module) for module in guarded.modules()] == [type(module) for module in plain.modules()]
