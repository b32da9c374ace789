"""``compensate=`` from end to end: what is measured, what is stored, what is refused, and what is written down."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from libraries import library_config, stored
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from optimum_qguard import QGuardConfig, QGuardError, QGuardInt8Config, QGuardNF4Config
from optimum_qguard.formats import WeightError, get_format
from optimum_qguard.guard import prerounding
from optimum_qguard.guard.backends import backend_of
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.compensation import feedback, round_compensated
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.guard.samples import generate_samples, tokenize_samples
from optimum_qguard.guard.second_moments import visit_second_moments

Saved = Callable[[str], Path]
TEXTS = [" ".join(f"w{(i * j) % 512}" for i in range(1, 300)) for j in range(1, 5)]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerounding, "SEQUENCES", 4)
    monkeypatch.setattr(prerounding, "LENGTH", 64)


@pytest.fixture(scope="module")
def with_tokenizer(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-tokenizer") / "model"
    shutil.copytree(saved("llama"), folder)
    save_tokenizer(folder)
    return folder


def load(folder: Path, config: Any, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        *(("llama", library) for library in ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4")),
        *(("llama-tied", library) for library in ("quanto-int8", "quanto-int4")),
        ("gpt2", "bnb-int8"),
        ("gpt2", "bnb-nf4"),
        ("mixtral", "bnb-nf4"),
    ],
)
def test_the_model_holds_the_chosen_symbols(saved: Saved, name: str, library: str) -> None:
    """Symbols are chosen again here, from second moments of the whole model, and compared with the library's."""
    model = load(saved(name), QGuardConfig(library_config(library), compensate="auto"))
    report, config = model.qguard_report, model.config.quantization_config
    assert {tensor.method for tensor in report.tensors} == {"compensated"}
    assert (report.samples.kind, report.samples.tokens) == ("own generations", 256)
    full = AutoModelForCausalLM.from_pretrained(saved(name))
    seed, backend = int(report.seed, 16), backend_of(config)
    formats = {
        tensor.name: backend.format_of(config, model.get_submodule(tensor.name[:-7]), tensor.name)
        for tensor in report.tensors
    }
    checked = []

    def check(layer: str, module: torch.nn.Module, moment: torch.Tensor) -> None:
        weight: Any = module.weight
        quantized = model.get_submodule(layer)
        weight = weight.T if backend.is_transposed(quantized) else weight
        format = formats[f"{layer}.weight"]
        stream = RandomStream(seed, f"{layer}.weight")
        codes, _ = stored(quantized, format, weight.shape)
        assert torch.equal(codes, round_compensated(weight, format, feedback(moment), stream).long())
        checked.append(layer)

    names = [name.removesuffix(".weight") for name in formats]
    visit_second_moments(full, names, generate_samples(full, seed, 4, 64), check)
    assert sorted(checked) == sorted(names)


def test_second_moments_are_those_of_the_inputs(saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    tokens = torch.arange(96).view(2, 48)
    inputs: dict[str, torch.Tensor] = {}
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0].detach().double()})
        )
    found: dict[str, torch.Tensor] = {}
    visit_second_moments(model, names, tokens, lambda name, _, moment: found.setdefault(name, moment))
    assert sorted(found) == sorted(names)
    for name in names:
        rows = inputs[name].flatten(0, 1)
        torch.testing.assert_close(found[name].double(), rows.T @ rows / 96, rtol=1e-4, atol=1e-6)
    assert found["model.layers.0.mlp.up_proj"] is found["model.layers.0.mlp.gate_proj"]
    assert all(len(model.get_submodule(name)._forward_pre_hooks) == 1 for name in names), "hooks were left behind"


def test_the_head_is_compensated_where_it_is_quantized(saved: Saved) -> None:
    report = load(saved("llama"), QGuardInt8Config(llm_int8_skip_modules=[], compensate="auto")).qguard_report
    assert ("lm_head.weight", "compensated") in {(tensor.name, tensor.method) for tensor in report.tensors}


def test_the_same_seed_gives_the_same_model(with_tokenizer: Path) -> None:
    for samples in ("auto", TEXTS):
        one = load(with_tokenizer, QGuardNF4Config(seed=5, compensate=samples)).state_dict()
        same = load(with_tokenizer, QGuardNF4Config(seed=5, compensate=samples)).state_dict()
        other = load(with_tokenizer, QGuardNF4Config(seed=6, compensate=samples)).state_dict()
        assert torch.equal(one[f"{UP}.weight"], same[f"{UP}.weight"])
        assert not torch.equal(one[f"{UP}.weight"], other[f"{UP}.weight"])


def test_outputs_are_closer_to_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tokens that were not measured on; a model whose layers read inputs that go together."""
    monkeypatch.setattr(prerounding, "SEQUENCES", 64)
    full = tiny_model("llama")
    generator = torch.Generator().manual_seed(9)
    few_directions = torch.randn(512, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    full.model.embed_tokens.weight.data.copy_(few_directions)
    full.save_pretrained(tmp_path)
    tokens = torch.randint(512, (4, 64), generator=generator)
    errors = []
    for samples in (None, "auto"):
        model = load(tmp_path, QGuardNF4Config(seed=1, compensate=samples))
        with torch.no_grad():
            errors.append(float((model(tokens).logits - full(tokens).logits).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_texts_or_a_dataset(with_tokenizer: Path) -> None:
    config = QGuardNF4Config(compensate=Dataset.from_dict({"text": TEXTS}), seed=1)
    assert config.compensate == TEXTS
    report = load(with_tokenizer, config).qguard_report
    assert (report.samples.kind, report.samples.sequences, report.samples.tokens) == ("texts", 4, 256)


def test_texts_are_written_nowhere(with_tokenizer: Path, tmp_path: Path) -> None:
    model = load(with_tokenizer, QGuardNF4Config(compensate=["secret w1 w2 " * 300]))
    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"secret" not in file.read_bytes(), file
    written = json.loads((tmp_path / "qguard.json").read_text())
    assert written["samples"] == {"kind": "texts", "sequences": 4, "tokens": 256}
    assert "with error feedback" in (tmp_path / "README.md").read_text()


def test_a_layer_that_no_sample_reaches_is_rounded_without_feedback(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prerounding.visit_second_moments

    def visit(model: Any, names: Any, *rest: Any) -> None:
        original(model, [name for name in names if name != UP], *rest)

    monkeypatch.setattr(prerounding, "visit_second_moments", visit)
    report = load(saved("llama"), QGuardNF4Config(compensate="auto")).qguard_report
    assert {tensor.name for tensor in report.tensors if tensor.method == "stochastic"} == {f"{UP}.weight"}
    assert "with error feedback and unbiased stochastic rounding;" in str(report)


def test_no_files_are_left(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerounding.tempfile, "tempdir", str(tmp_path))
    load(saved("llama"), QGuardNF4Config(compensate="auto"))
    assert not list(tmp_path.iterdir())


def test_other_weights_than_were_rounded_are_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    original = prerounding.full_precision

    def other(*arguments: Any) -> Any:
        model = original(*arguments)
        model.get_submodule(UP).weight.data.mul_(1.01)
        return model

    from optimum_qguard.guard import quantizer

    monkeypatch.setattr(quantizer, "full_precision", other)
    with pytest.raises(QGuardError, match=f"^the model was not loaded: {UP}.weight: other weights are quantized"):
        load(saved("llama"), QGuardNF4Config(compensate="auto"))


def test_a_model_that_cannot_run(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QGuardError, match=r"^the model was not loaded: compensate could not run LlamaForC[^\n]*$"):
        load(tmp_path, QGuardNF4Config(compensate="auto"))
    tensors[f"{UP}.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QGuardError, match=f"^the model was not loaded: {UP}.weight: 1 NaN"):
        load(tmp_path, QGuardNF4Config(compensate="auto"))


def test_what_is_refused(saved: Saved, with_tokenizer: Path) -> None:
    with pytest.raises(QGuardConfigError, match=r"has no tokenizer[^\n]*compensate='auto'$"):
        load(saved("llama"), QGuardNF4Config(compensate=TEXTS))
    with pytest.raises(QGuardConfigError, match=r"have 3 token\(s\); at least 256 are needed"):
        load(with_tokenizer, QGuardNF4Config(compensate=["w1 w2"]))
    with pytest.raises(QGuardConfigError, match="LlamaModel does not generate text"):
        AutoModel.from_pretrained(saved("llama"), quantization_config=QGuardNF4Config(compensate="auto"))
    with pytest.raises(QGuardConfigError, match="BertForMaskedLM does not generate text"):
        AutoModelForMaskedLM.from_pretrained(saved("bert"), quantization_config=QGuardNF4Config(compensate="auto"))
    quanto = QGuardConfig(library_config("quanto-int8"), compensate="auto")
    with pytest.raises(QGuardConfigError, match=r"no fixed grid for torch.bfloat16 [^\n]*dtype=torch.float32"):
        load(saved("llama"), quanto, dtype=torch.bfloat16)


def test_texts_are_cut_into_sequences(with_tokenizer: Path, saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    tokens = tokenize_samples(["w5 w6", "w7 " * 400], model, 5, 64)
    assert tokens.shape == (5, 64)
    assert tokens[0, :4].tolist() == [5, 6, 2, 7]  # w2 ends a text


def test_own_generations_follow_the_models_distribution(saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[7:9] = 1e-6  # nearly uniform
    tokens = generate_samples(model, 3, 4, 64)
    assert tokens.shape == (4, 64)
    assert (tokens[:, 0] == model.config.bos_token_id).all()
    assert len(tokens[:, 1:].unique()) > 150
    assert torch.equal(tokens, generate_samples(model, 3, 4, 64))
    assert not torch.equal(tokens, generate_samples(model, 4, 4, 64))


@pytest.mark.parametrize("format", ["gguf-q8_0", "gguf-q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_full_precision_checkpoint(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    tiny_model("llama", dtype).save_pretrained(tmp_path / "model")
    report = guard_checkpoint(tmp_path / "model", tmp_path / "out", format, compensate="auto", seed=1)
    methods = {tensor.name: tensor.method for tensor in report.tensors}
    assert methods[f"{UP}.weight"] == "compensated"
    assert methods["model.embed_tokens.weight"] == "stochastic"
    before, after = (load_file(tmp_path / name / "model.safetensors")[f"{UP}.weight"] for name in ("model", "out"))
    assert not torch.equal(before, after)
    kind = get_format(format)
    assert torch.equal(kind.grid(kind.blocks(before)).scale, kind.grid(kind.blocks(after)).scale)


def test_a_checkpoint_for_a_searched_grid_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(QGuardConfigError, match="no grid that guard knows beforehand"):
        guard_checkpoint(saved("llama"), tmp_path / "out", "gptq-4", compensate="auto")
    with pytest.raises(WeightError, match="NaN"):
        round_compensated(torch.full((2, 2), torch.nan), get_format("nf4"), feedback(torch.eye(2)), RandomStream(0, ""))
