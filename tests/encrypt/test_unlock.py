"""Whoever has the key loads an encrypted model quantized, as if it had never been encrypted; nobody else does."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard import QGuardConfig, QGuardError, QGuardNF4Config, guard_all
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.encrypt.unlock import QGuardUnlockConfig
from optimum_qguard.guard.backends import preset
from optimum_qguard.guard.checkpoint import guard_checkpoint

KEY = Key(bytes(range(32)))
IDS = torch.arange(24).view(2, 12) * 17 % 512


@pytest.fixture(scope="module")
def encrypted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encrypted") / "model"
    encrypt_checkpoint(tiny_llama, out, key=KEY)
    return out


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    gc.collect()


def load(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@torch.no_grad()
def assert_equal(model: Any, other: Any) -> None:
    for (name, parameter), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(parameter), torch.as_tensor(expected)), name
    assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("library", ["bnb-int8", "bnb-nf4"])
def test_as_if_it_had_never_been_encrypted(encrypted: Path, tiny_llama: Path, library: str) -> None:
    model = load(encrypted, QGuardUnlockConfig(preset(library), key=KEY))
    assert_equal(model, load(tiny_llama, preset(library)))
    assert model.config.quantization_config.quant_method == "bitsandbytes"


@pytest.mark.parametrize(
    ("library", "options"),
    [("bnb-int8", {}), ("bnb-int8", {"noise": "global"}), ("bnb-nf4", {"compensate": "auto"})],
)
def test_under_guard(encrypted: Path, tiny_llama: Path, library: str, options: dict[str, Any]) -> None:
    guarded = QGuardConfig(preset(library), seed=5, **options)
    model = load(encrypted, QGuardUnlockConfig(guarded, key=KEY))
    assert_equal(model, load(tiny_llama, guarded))
    assert model.qguard_report.rescaled == 0


def test_saved_it_is_a_plain_quantized_model(encrypted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    load(encrypted, QGuardUnlockConfig(preset("bnb-nf4"), key=KEY)).save_pretrained(tmp_path / "saved")
    assert KEY.secret.hex().encode() not in b"".join(
        path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.suffix == ".json"
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = load(tiny_llama, preset("bnb-nf4"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected(IDS).logits)


def test_a_key_file_and_no_key_in_the_dict(encrypted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    KEY.save(tmp_path / "model.key")
    config = QGuardUnlockConfig(preset("bnb-int8"), key=tmp_path / "model.key")
    assert KEY.secret.hex() not in str(config.to_dict())
    assert_equal(load(encrypted, config), load(tiny_llama, preset("bnb-int8")))


def test_guard_without_the_key_gives_the_publishers_notice(encrypted: Path) -> None:
    with pytest.raises(QGuardError, match=r"protected against quantization\. Its publisher does not want .* the key"):
        load(encrypted, QGuardNF4Config())
    with guard_all(), pytest.raises(QGuardError, match="protected against quantization"):
        load(encrypted, preset("bnb-int8"))


def test_noising_for_llama_cpp_without_the_key_too(encrypted: Path, tmp_path: Path) -> None:
    with pytest.raises(QGuardError, match="protected against quantization"):
        guard_checkpoint(encrypted, tmp_path / "out", "gguf-q8_0")
    assert not (tmp_path / "out").exists()


def test_plain_quantization_breaks_it(encrypted: Path, tiny_llama: Path) -> None:
    with torch.no_grad():
        reference, plain, broken = (
            model(IDS).logits.float().log_softmax(-1)
            for model in (
                AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto"),
                load(tiny_llama, preset("bnb-int8")),
                load(encrypted, preset("bnb-int8")),
            )
        )
    near, far = (torch.nn.functional.kl_div(q, reference, log_target=True) for q in (plain, broken))
    assert not far < 100 * near  # or not a number


def test_refusals(encrypted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    config = QGuardUnlockConfig(preset("bnb-int8"), key=Key.generate())
    with pytest.raises(EncryptError, match="another key"):
        load(encrypted, config)
    with pytest.raises(EncryptError, match="no encrypted checkpoint"):
        load(tiny_llama, config)
    with pytest.raises(EncryptError, match="takes one of transformers' quantization configurations"):
        QGuardUnlockConfig("bnb-int8", key=KEY)  # type: ignore[arg-type]


def test_a_foreign_manifest_that_is_no_json_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "qguard.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"qguard\.json: cannot be read as JSON"):
        load(folder, QGuardNF4Config())


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_tampered_tensor_is_not_loaded(encrypted: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(encrypted, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].flatten()[3] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for config in (preset("bnb-int8"), QGuardConfig(preset("bnb-int8"))):
        with pytest.raises((EncryptError, QGuardError), match=f"{name} is not the tensor that was encrypted"):
            load(folder, QGuardUnlockConfig(config, key=KEY))


def test_a_load_that_failed_unlocks_nothing_afterwards(encrypted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(encrypted, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncryptError):
        load(folder, QGuardUnlockConfig(preset("bnb-int8"), key=KEY))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(
        model.get_parameter("model.layers.0.input_layernorm.weight"), tensors["model.layers.0.input_layernorm.weight"]
    )
