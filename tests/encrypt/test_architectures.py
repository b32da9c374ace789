"""Scaling every channel of every site by a random power of two leaves every logit's bits as they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import CASES, Case, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_qguard.encrypt.architectures import find_sites, known_model_types
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
