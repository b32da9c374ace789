"""Scaling every channel of every site by a random power of two leaves every logit's bits as they are."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from random_models import CASES, Case, random_model, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_qguard.encrypt.architectures import ArchitectureError, find_sites, known_model_types
from optimum_qguard.encrypt.sites import Site

TOKENS = torch.tensor([[5, 17, 3, 60, 11, 42, 7], [8, 8, 29, 4, 80, 33, 21]])
PREFILLED = 4


def apply(tensors: Mapping[str, Tensor], sites: list[Site], exponents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with every site's factors, ``2 ** exponents[site.name]`` ``(n_channels,)``."""
    scaled = dict(tensors)
    for site in sites:
        for part in site.parts:
            exponent = torch.where(part.channels < 0, 0, exponents[site.name][part.channels])
            factor = torch.exp2(-exponent if part.divided else exponent)
            scaled[part.tensor] = scaled[part.tensor] * factor.to(scaled[part.tensor].dtype)
    return scaled


def random_exponents(sites: list[Site]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {site.name: torch.randint(-9, 10, (site.n_channels,), generator=generator).float() for site in sites}


def load(folder: Path, case: Case) -> PreTrainedModel:
    model_class = AutoModelForCausalLM if case.model_class is None else getattr(transformers, case.model_class)
    model, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def logits(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits by attention implementation and phase: all tokens at once, and one after another on a cache."""
    results = {}
    for attention in ("eager", "sdpa"):
        if attention == "sdpa" and not model._supports_sdpa:
            continue
        model.set_attn_implementation(attention)
        results[f"{attention} prefill"] = model(TOKENS, use_cache=False).logits
        output = model(TOKENS[:, :PREFILLED], use_cache=True)
        steps = [output.logits]
        for position in range(PREFILLED, TOKENS.shape[1]):
            output = model(TOKENS[:, position : position + 1], past_key_values=output.past_key_values)
            steps.append(output.logits)
        results[f"{attention} decoding"] = torch.cat(steps, dim=1)
    return results


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_logits_keep_their_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    save_random(case, tmp_path, dtype)
    config, tensors = checkpoint(tmp_path)
    sites = find_sites(config, shapes_of(tensors))
    scaled = apply(tensors, sites, random_exponents(sites))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in scaled.values())
    expected = logits(load(tmp_path, case))

    save_file(scaled, tmp_path / "model.safetensors", {"format": "pt"})
    found = logits(load(tmp_path, case))

    for what in expected:
        assert torch.isfinite(expected[what]).all(), what
        assert torch.equal(expected[what], found[what]), what


@pytest.mark.parametrize("name", CASES)
def test_sites_are_complete_and_every_part_changes_its_tensor(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_random(case, tmp_path, torch.float32)
    config, tensors = checkpoint(tmp_path)
    sites = find_sites(config, shapes_of(tensors))
    exponents = random_exponents(sites)

    assert len({site.name for site in sites}) == len(sites)
    for layer in ("0", "1"):
        assert {site.kind for site in sites if layer in site.name.split(".")[:5]} == case.kinds
    for site in sites:
        assert any(part.divided for part in site.parts)
        assert not all(part.divided for part in site.parts)
        used = set()
        for part in site.parts:
            assert part.channels.dtype == torch.int64
            assert part.channels.dim() == tensors[part.tensor].dim()
            used.update(part.channels.flatten().tolist())
            alone = Site(site.name, site.kind, site.n_channels, (part,))
            assert not torch.equal(apply(tensors, [alone], exponents)[part.tensor], tensors[part.tensor])
        assert used - {-1} == set(range(site.n_channels))


def test_every_known_architecture_has_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(known_model_types())


def llama() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    return configured("llama")


def configured(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and shapes of a case's checkpoint, its bare tensors as in the model."""
    model = random_model(CASES[name], torch.float32)
    return model.config.to_dict(), shapes_of(model.state_dict())


def test_names_of_sites_are_stable() -> None:
    """Factors are drawn from them: a changed name is a checkpoint that its key no longer opens."""
    names = [
        "norm.input_layernorm",
        "norm.post_attention_layernorm",
        "value.self_attn.v_proj",
        "up.mlp.up_proj",
        "key.self_attn.k_proj",
    ]
    assert [site.name for site in find_sites(*llama())] == [
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names
    ]
    assert [site.name for site in find_sites(*configured("gpt2"))][:4] == [
        "transformer.h.0.norm.ln_1",
        "transformer.h.0.norm.ln_2",
        "transformer.h.0.value.attn.c_attn",
        "transformer.h.0.key.attn.c_attn",
    ]
    assert "model.layers.1.up.mlp.experts.3.up_proj" in [site.name for site in find_sites(*saved_shapes("qwen3-moe"))]
    latent = [site.name for site in find_sites(*configured("deepseek-v3")) if site.name.startswith("model.layers.0.")]
    assert "model.layers.0.key.self_attn.kv_b_proj" in latent
    assert "model.layers.0.key.self_attn.kv_a_proj_with_mqa" in latent


def saved_shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    with TemporaryDirectory() as folder:
        save_random(CASES[name], Path(folder), torch.float32)
        config, tensors = checkpoint(Path(folder))
        return config, shapes_of(tensors)


def test_checkpoints_of_the_bare_model() -> None:
    config, shapes = configured("gpt2")
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    assert [site.name for site in find_sites(config, bare)] == [
        site.name.removeprefix("transformer.") for site in find_sites(config, shapes)
    ]


@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_text_model_s_layers_is_touched(name: str) -> None:
    config, shapes = configured(name)
    touched = {part.tensor for site in find_sites(config, shapes) for part in site.parts}
    assert all(re.search(r"(layers|\bh)\.[01]\.", tensor) for tensor in touched)
    assert not any("vision" in tensor for tensor in touched)


def test_older_spellings_and_defaults_of_options() -> None:
    """Configurations on the Hub leave out defaults and spell rotary options as transformers 4 did."""
    config, shapes = configured("gpt-neox")
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    for rotary_pct, n_channels in ((0.5, 4 * (4 + 8)), (1.0, 4 * 8)):
        sites = find_sites({**old, "rotary_pct": rotary_pct}, shapes)
        assert [site.n_channels for site in sites if site.kind == "key"] == [n_channels] * 2
    config, shapes = configured("falcon-7b")
    small = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    assert len(find_sites(small, shapes)) == len(find_sites(config, shapes)) == 6


def test_an_unknown_architecture_is_not_guessed() -> None:
    config, shapes = llama()
    for model_type in ("mamba", None):
        with pytest.raises(ArchitectureError, match=f"{model_type!r} may be scaled; known: bloom, .*, starcoder2$"):
            find_sites({**config, "model_type": model_type}, shapes)


@pytest.mark.parametrize(
    "tensor",
    [
        "self_attn.q_norm.weight",
        "self_attn.g_proj.weight",
        "mlp.experts.0.up_proj.weight",
        "mlp.gate_proj.weight_scale_inv",
        "input_layernorm.scale",
        "pre_feedforward_layernorm.weight",
    ],
)
def test_an_unknown_tensor_in_a_layer_is_refused(tensor: str) -> None:
    config, shapes = llama()
    with pytest.raises(ArchitectureError, match=rf"^model\.layers\.1\.{re.escape(tensor)} is not known in models of"):
        find_sites(config, {**shapes, f"model.layers.1.{tensor}": (64,)})


@pytest.mark.parametrize("name", CASES)
def test_every_family_refuses_unknown_tensors(name: str) -> None:
    config, shapes = configured(name)
    prefix = re.match(r"(.*?(?:layers|h)\.)1\.", next(n for n in shapes if re.search(r"(layers|\bh)\.1\.", n)))
    assert prefix is not None
    with pytest.raises(ArchitectureError, match=r"1\.another\.weight is not known"):
        find_sites(config, {**shapes, f"{prefix[1]}1.another.weight": (64, 64)})


def test_layers_that_are_missing_doubled_or_beyond() -> None:
    config, shapes = llama()
    first = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.1.")}
    with pytest.raises(ArchitectureError, match="layer 1 of 2 is not in the checkpoint"):
        find_sites(config, first)
    with pytest.raises(ArchitectureError, match=r"no decoder layers; a 'llama' model has them under model\.layers\.0"):
        find_sites(config, {f"base_model.{name}": shape for name, shape in shapes.items()})
    with pytest.raises(ArchitectureError, match=r"under layers\. and model\.layers\. at once"):
        find_sites(config, {**shapes, "layers.0.input_layernorm.weight": (64,)})
    beyond = {**shapes, "model.layers.2.eh_proj.weight": (64, 128)}
    assert [site.name for site in find_sites(config, beyond)] == [site.name for site in find_sites(config, shapes)]


def test_shapes_must_be_what_the_configuration_says() -> None:
    config, shapes = llama()
    with pytest.raises(ArchitectureError, match=r"v_proj\.weight has shape \(32, 64\)"):
        find_sites({**config, "num_key_value_heads": 4}, shapes)
    with pytest.raises(ArchitectureError, match=r"config\.json is not that of a 'llama' model"):
        find_sites({**config, "num_attention_heads": "four"}, shapes)
