"""Whatever goes wrong, no model comes back that was quantized without guard; and the message is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library_config
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, QuantoConfig
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb8bitQuantize

from optimum_qguard import QGuardConfig, QGuardError, QGuardInt8Config
from optimum_qguard.guard import backends, quantizer, randomizer
from optimum_qguard.guard.backends import preset
from optimum_qguard.guard.errors import QGuardConfigError

LIBRARIES = ["bnb-int8", "bnb-nf4", "torchao-int8", "quanto-int8"]
TENSOR = "model.layers.1.mlp.up_proj.weight"


def refused(folder: Path, config: Any, capfd: pytest.CaptureFixture[str], **arguments: Any) -> str:
    """The one line that loading fails with, after nothing but progress bars were printed."""
    with pytest.raises((QGuardError, QGuardConfigError)) as caught:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)
    printed = "".join(capfd.readouterr())
    assert "LOAD REPORT" not in printed
    assert "Traceback" not in printed
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def altered(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Llama with one weight set to a value, or a tensor left out."""

    def alter(value: float | None, name: str = TENSOR) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(tiny_llama, folder)
        tensors = load_file(folder / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name][3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return alter


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("error", [RuntimeError("the noise broke"), ValueError("the noise broke"), MemoryError()])
def test_noise_that_raises_inside_the_conversion(
    tiny_llama: Path,
    library: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    original = randomizer.draw

    def draw(*args: Any, name: str, **kwargs: Any) -> Any:
        if name == TENSOR:
            raise error
        return original(*args, name=name, **kwargs)

    monkeypatch.setattr(randomizer, "draw", draw)
    message = refused(tiny_llama, QGuardConfig(library_config(library)), capfd)
    assert message.startswith("the model was not loaded: ")
    assert TENSOR in message
    assert str(error) in message


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_raises_inside_the_conversion(
    tiny_llama: Path, library: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = quantizer._GuardedQuantize.convert

    def convert(self: Any, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if TENSOR in tensors:
            self._operation.convert = lambda *_, **__: 1 / 0
        return original(self, tensors, *args, **kwargs)

    monkeypatch.setattr(quantizer._GuardedQuantize, "convert", convert)
    message = refused(tiny_llama, QGuardConfig(library_config(library)), capfd)
    assert TENSOR in message
    assert "division by zero" in message


def test_a_tensor_that_goes_around_guard(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As if transformers took the library's own operation for one tensor."""

    class GoesAround(ConversionOps):  # type: ignore[misc]
        def __init__(self, guarded: Any) -> None:
            self._guarded = guarded

        def convert(self, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            operation = self._guarded._operation if TENSOR in tensors else self._guarded
            assert TENSOR not in tensors or type(operation) is Bnb8bitQuantize
            return operation.convert(tensors, *args, **kwargs)

    original = quantizer.Guard.get_quantize_ops
    monkeypatch.setattr(quantizer.Guard, "get_quantize_ops", lambda self: GoesAround(original(self)))
    message = refused(tiny_llama, QGuardInt8Config(), capfd)
    assert "1 tensor(s) were quantized without guard" in message
    assert TENSOR in message


def test_a_tensor_that_guard_did_not_expect_is_guarded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantizer.Guard.preprocess_model

    def preprocess_model(self: Any, model: Any, **kwargs: Any) -> None:
        original(self, model, **kwargs)
        self._weights.expected.remove(TENSOR)

    monkeypatch.setattr(quantizer.Guard, "preprocess_model", preprocess_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=QGuardInt8Config())
    assert TENSOR in {tensor.name for tensor in model.qguard_report.tensors}


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinite")])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("noise", ["per_layer", "global"])
def test_weights_that_are_no_numbers(
    altered: Callable[..., Path],
    value: float,
    word: str,
    library: str,
    noise: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    message = refused(altered(value), QGuardConfig(library_config(library), noise=noise), capfd)
    assert f"{TENSOR}: 1 {word} weight(s), the first at (3, 5)" in message


def test_weights_beyond_float16(altered: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert f"{TENSOR}: weights too large" in refused(altered(1e6), QGuardInt8Config(), capfd)


def test_a_tensor_that_the_checkpoint_lacks_is_not_quantized(altered: Callable[..., Path]) -> None:
    """transformers makes one up; the library leaves it in full precision, so that there is no rounding to guard."""
    model = AutoModelForCausalLM.from_pretrained(altered(None), quantization_config=QGuardInt8Config())
    assert TENSOR not in {tensor.name for tensor in model.qguard_report.tensors}
    assert model.get_parameter(TENSOR).is_floating_point()


@pytest.mark.parametrize(
    "config",
    [
        QGuardInt8Config(llm_int8_skip_modules=["model", "lm_head"]),
        QGuardConfig(QuantoConfig(modules_to_not_convert=["model", "lm_head"])),
    ],
    ids=["bitsandbytes", "quanto"],
)
def test_nothing_quantized(tiny_llama: Path, config: QGuardConfig, capfd: pytest.CaptureFixture[str]) -> None:
    assert "quantized none of its tensors, so there is nothing to guard" in refused(tiny_llama, config, capfd)


def test_a_model_that_the_library_cannot_quantize(
    saved: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has no linear layers, only transposed ones, which quanto does not know."""
    assert "QuantoConfig quantized none" in refused(saved("gpt2"), QGuardConfig(QuantoConfig()), capfd)


def test_no_guard_is_left_behind_after_a_failure(
    altered: Callable[..., Path], tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = QGuardInt8Config()
    refused(altered(torch.nan), config, capfd)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert len(model.qguard_report.tensors) == 14


@pytest.mark.parametrize("library", ["bnb-int8", "torchao-int8"])
def test_a_repository_that_is_quantized_already(
    tiny_llama: Path, tmp_path: Path, library: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = library_config(library)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config).save_pretrained(tmp_path)
    message = refused(tmp_path, QGuardInt8Config(), capfd)
    assert message.startswith("the model is quantized already (")
    assert "guard its full-precision original" in message


def test_a_repository_that_names_qguard_itself(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = QGuardInt8Config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(QGuardConfigError, match=r"^config\.json names 'qguard' [^\n]*$"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("torchao-int8", r"pip install 'optimum-qguard\[torchao\]'"),
        ("quanto-int8", r"pip install 'optimum-qguard\[quanto\]'"),
        ("gptq-4", r"pip install 'optimum-qguard\[gptq\]'"),
        ("bnb-int8", "pip install optimum-qguard"),
    ],
)
def test_a_missing_library_is_named_with_its_command(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = backends.importlib.util.find_spec

    def find_spec(package: str) -> Any:
        missing = ("torchao", "optimum.quanto", "gptqmodel", "bitsandbytes")
        return None if package in missing else found(package)

    monkeypatch.setattr(backends.importlib.util, "find_spec", find_spec)
    with pytest.raises(QGuardConfigError, match=rf"^the package [^\n]* is not installed; [^\n]*{command}$"):
        preset(name)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="300KB")
    return tmp_path


@pytest.mark.parametrize("keep", [slice(0, -100), slice(0, 5), slice(0, 0)], ids=["end", "header", "all"])
@pytest.mark.parametrize("library", ["bnb-int8", "torchao-int8"])
def test_a_truncated_shard_is_named(shards: Path, keep: slice, library: str, capfd: pytest.CaptureFixture[str]) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[keep])
    message = refused(shards, QGuardConfig(library_config(library)), capfd)
    assert f"{shard}: not a complete safetensors file" in message
    assert "download or copy it again" in message


def test_a_missing_shard_is_named(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: not a complete safetensors file" in refused(shards, QGuardInt8Config(), capfd)
