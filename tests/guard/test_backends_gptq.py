"""GPTQ through gptqmodel: symbols chosen with error feedback, or noise, before its calibration.

float32 throughout: gptqmodel's BF16 kernels for CPUs repack a model when it first runs, and it cannot be saved then.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM, GPTQConfig

from optimum_qguard import GuardReport, QGuardConfig, QGuardError, QGuardGPTQConfig
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.guard.backends.gptq import GPTQModel
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.noise import draw
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.guard.randomizer import Randomizer

pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.slow

GROUP = 32
TOKENS = torch.arange(3, 35).unsqueeze(0)


def samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 512, (1, 64), generator=generator) for _ in range(2)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in tokens]


def load(folder: Path, config: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("gptq") / "model", intermediate_size=128)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Any:
    return load(folder, QGuardGPTQConfig(bits=4, group_size=GROUP, dataset=samples(), seed=3))


@pytest.fixture(scope="module")
def noised(folder: Path) -> Any:
    options: dict[str, Any] = {"method": "uniform", "noise": "per_cell"}
    return load(folder, QGuardConfig(GPTQConfig(bits=4, group_size=GROUP, dataset=samples()), **options, seed=3))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return load(folder, GPTQConfig(bits=4, group_size=GROUP, dataset=samples()))


def quantized(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}


def test_every_quantized_layer_is_in_the_report(guarded: Any) -> None:
    names = {tensor.name.removesuffix(".weight") for tensor in guarded.qguard_report.tensors}
    assert names == quantized(guarded).keys()
    assert len(names) == 14
    assert {tensor.method for tensor in guarded.qguard_report.tensors} == {"compensated"}
    assert guarded.qguard_report.samples.kind == "own generations"


@pytest.mark.parametrize("options", [{}, {"method": "stochastic"}, {"sym": False}, {"bits": 8}], ids=str)
def test_gptq_keeps_the_symbols_that_guard_chose(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """But for those that set a scale, and few others."""
    handed: dict[str, torch.Tensor] = {}

    def note(self: Any, weight: Any, format: Any, name: str) -> Any:
        drawn, method = original(self, weight, format, name)
        handed[name] = drawn.weight
        return drawn, method

    original = Randomizer._draw
    monkeypatch.setattr(Randomizer, "_draw", note)
    arguments = {"bits": 4, "sym": True} | {key: value for key, value in options.items() if key != "method"}
    inner = GPTQConfig(**arguments, group_size=GROUP, dataset=samples())
    model = load(folder, QGuardConfig(inner, method=options.get("method", "auto"), seed=3))
    format = GPTQ(arguments["bits"], GROUP, arguments["sym"])
    assert len(handed) == 14
    for name, weight in handed.items():
        chosen = format.quantize(weight)
        scale = format.unblock(chosen.grid.scale.expand(chosen.block_codes.shape), weight.shape)
        module = model.get_submodule(name.removesuffix(".weight"))
        moved = (module.dequantize_weight().T - chosen.dequantize()).abs() / scale
        assert (moved < 0.5).float().mean() > 0.95, name


def test_a_quarter_of_the_symbols_changes(noised: Any) -> None:
    for tensor in noised.qguard_report.tensors:
        assert tensor.format == str(GPTQ(4, GROUP, True))
        assert tensor.method == "uniform"
        assert tensor.amplitude is None
        assert 0.2 < tensor.share_changed < 0.3


def test_groups_in_an_order_that_is_not_known(folder: Path) -> None:
    """With ``desc_act`` there is nothing to round to beforehand."""
    inner = GPTQConfig(bits=4, group_size=GROUP, desc_act=True, dataset=samples())
    model = load(folder, QGuardConfig(inner))
    assert {tensor.method for tensor in model.qguard_report.tensors} == {"uniform"}
    with pytest.raises(QGuardConfigError, match="GPTQConfig has no grid that guard knows beforehand, so errors"):
        load(folder, QGuardConfig(inner, compensate="auto"))


def test_planted_outliers_are_clipped_before_symbols_are_chosen(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name).data
    rows = torch.arange(len(weight))
    weight[rows, 7 * rows % weight.shape[1]] *= 512
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    report = load(tmp_path, QGuardGPTQConfig(group_size=GROUP, dataset=samples())).qguard_report
    assert {tensor.method for tensor in report.tensors} == {"compensated"}
    clipped = {tensor.name: tensor.clipped for tensor in report.tensors if tensor.clipped}
    assert clipped.keys() == {name}
    assert clipped[name] > 0.9 * len(weight)


def test_gptq_calibrates_on_exactly_the_noised_weights(noised: Any, folder: Path, tmp_path: Path) -> None:
    """Noise the checkpoint by hand, quantize it without guard: the same weights come out."""
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report = noised.qguard_report
    for tensor in report.tensors:
        weight = full.get_parameter(tensor.name).data
        stream = RandomStream(int(report.seed, 16), tensor.name)
        weight.copy_(draw(weight, GPTQ(4, GROUP), "uniform", stream, half_widths=1.0, per_cell=True).weight)
    full.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    by_hand = load(tmp_path, GPTQConfig(bits=4, group_size=GROUP, dataset=samples()))
    for name, module in quantized(noised).items():
        for buffer in ("qweight", "qzeros", "scales"):
            assert torch.equal(getattr(module, buffer), getattr(by_hand.get_submodule(name), buffer)), name


def test_guarded_weights_are_others(guarded: Any, plain: Any) -> None:
    for name, module in quantized(plain).items():
        assert not torch.equal(module.qweight, guarded.get_submodule(name).qweight)
    assert type(guarded.hf_quantizer) is type(plain.hf_quantizer)
    assert guarded.hf_quantizer.postprocess_model.__func__ is type(plain.hf_quantizer).postprocess_model


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["optimum_qguard"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.arange(3, 35).unsqueeze(0)).logits, sys.argv[2])
"""


def test_saved_and_loaded_without_this_package(guarded: Any, tmp_path: Path) -> None:
    expected = logits(guarded)
    guarded.save_pretrained(tmp_path)
    report = GuardReport.model_validate_json((tmp_path / "qguard.json").read_text())
    assert report == guarded.qguard_report
    assert "qguard" not in (tmp_path / "config.json").read_text()
    assert '"dataset": null' in (tmp_path / "config.json").read_text()
    program = [sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path, tmp_path / "logits.pt"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_auto_gptqs_format(folder: Path, tmp_path: Path) -> None:
    """What auto-gptq wrote, gptqmodel and transformers read: zero points of version 1 and quantize_config.json."""
    import gptqmodel

    model = load(folder, QGuardGPTQConfig(bits=4, group_size=GROUP, dataset=samples()))
    expected = logits(model)
    optimum = model.hf_quantizer.optimum_quantizer
    model.config.quantization_config.format = "gptq"
    optimum.save(model, tmp_path)
    model.qguard_report.write(tmp_path)
    save_tokenizer(tmp_path)
    assert (tmp_path / "quantize_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    by_gptqmodel = gptqmodel.GPTQModel.load(str(tmp_path), device="cpu", dtype=torch.float32)
    assert by_gptqmodel.quantize_config.format == "gptq"
    # Another kernel, which holds scales in BF16.
    torch.testing.assert_close(logits(by_gptqmodel.model), expected, atol=0.02, rtol=0)
    assert expected.std() > 0.1


def test_only_the_chosen_modules(folder: Path) -> None:
    chosen = [["self_attn.q_proj"], ["mlp.down_proj"]]
    config = QGuardGPTQConfig(
        bits=8, group_size=-1, act_group_aware=False, dataset=samples(), modules_in_block_to_quantize=chosen
    )
    config.noise, config.multiplier = "global", 0.5
    model = load(folder, config)
    names = {tensor.name.removesuffix(".weight") for tensor in model.qguard_report.tensors}
    assert names == quantized(model).keys()
    assert len(names) == 4
    assert len({tensor.amplitude for tensor in model.qguard_report.tensors}) == 1
    full = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, full["model.layers.0.mlp.up_proj.weight"])


def test_a_weight_that_is_no_number_is_named_before_calibrating(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(QGuardError, match=r"^[^\n]*model\.layers\.1\.mlp\.up_proj\.weight: 1 NaN [^\n]*$"):
        load(tmp_path, QGuardGPTQConfig(group_size=GROUP, dataset=samples()))


def test_offloaded_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    modules = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    with pytest.raises(QGuardError, match=r"model\.layers\.1\.[^\n]* is offloaded, where guard cannot reach it"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=QGuardGPTQConfig(group_size=GROUP, dataset=samples()),
            dtype=torch.float32,
            device_map={**dict.fromkeys(modules, "cpu"), "model.layers.1": "disk"},
            offload_folder=tmp_path,
        )


def test_a_layer_that_guard_does_not_know_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = GPTQModel.modules_to_calibrate

    def all_but_one(self: Any, *args: Any) -> Any:
        modules = original(self, *args)
        del modules["model.layers.1.mlp.up_proj"]
        return modules

    monkeypatch.setattr(GPTQModel, "modules_to_calibrate", all_but_one)
    message = r"1 tensor\(s\) were quantized without guard, the first model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(QGuardError, match=message):
        load(folder, QGuardGPTQConfig(group_size=GROUP, dataset=samples()))
