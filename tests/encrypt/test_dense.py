"""Dense mode: the same function up to rounding, in every layout; what comes back, and what is said about it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from random_models import CASES, save_random
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard.encrypt.architectures import find_sites
from optimum_qguard.encrypt.change import changes
from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.manifest import EncryptReport
from optimum_qguard.encrypt.residue import Residue
from optimum_qguard.encrypt.scaling import InexactError
from optimum_qguard.encrypt.transform import decrypt_checkpoint, encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.encrypt.unlock import QGuardUnlockConfig
from optimum_qguard.guard.backends import preset

KEY = Key(bytes(range(32)))
IDS = torch.arange(24).view(2, 12) * 17 % 512
TOKENS = torch.tensor([[5, 17, 3, 60, 11, 42, 7], [8, 8, 29, 4, 80, 33, 21]])
STRONG = {"conditioning": Conditioning(plain_layers=0), "residue": Residue(4.0, 5.0, every=1)}

# Biases, heads of 24, one key-value head, transposed, fused in every way, latent.
LAYOUTS = ["llama", "llama-head-dim", "llama-multi-query", "gpt2", "gpt-neox", "falcon-7b", "falcon-40b", "bloom"]
LAYOUTS += ["phi3", "opt", "deepseek-v3", "gemma2"]


def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.set_experts_implementation("eager")  # others take no float64
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = (each.double().log_softmax(-1) for each in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def dense(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EncryptReport]:
    out = tmp_path_factory.mktemp("dense") / "model"
    return out, encrypt_checkpoint(tiny_llama, out, key=KEY, mode="dense")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_float64_model_computes_the_same(name: str, tmp_path: Path) -> None:
    save_random(CASES[name], tmp_path, torch.float64)
    file = tmp_path / "model.safetensors"
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(file)
    sites = find_sites(config, {tensor: tuple(weight.shape) for tensor, weight in tensors.items()})
    by_tensor = changes(sites, KEY, traps=Traps(strength=5), **STRONG)
    mixed = {tensor for tensor, change in by_tensor.items() if change.mixes}
    assert mixed == {part.tensor for site in sites if site.kind == "value" for part in site.parts}
    expected = logits(tmp_path, TOKENS)

    changed = {
        tensor: by_tensor[tensor].apply(weight.clone(), 0) if tensor in by_tensor else weight
        for tensor, weight in tensors.items()
    }
    for tensor in mixed:
        assert (changed[tensor] - tensors[tensor]).abs().amax() > 0.1
        restored = by_tensor[tensor].apply(changed[tensor].clone(), 0, inverse=True)
        torch.testing.assert_close(restored, tensors[tensor], rtol=0, atol=1e-12)
    save_file(changed, file, {"format": "pt"})
    torch.testing.assert_close(logits(tmp_path, TOKENS), expected, rtol=1e-10, atol=1e-10)


def test_rows_of_a_fused_tensor_that_are_not_values_keep_their_bits(tmp_path: Path) -> None:
    save_random(CASES["phi3"], tmp_path, torch.bfloat16)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    sites = find_sites(config, {tensor: tuple(weight.shape) for tensor, weight in tensors.items()})
    name = "model.layers.0.self_attn.qkv_proj.weight"
    change = changes(sites, KEY, traps=Traps(), **STRONG)[name]
    back = change.apply(change.apply(tensors[name].clone(), 0), 0, inverse=True)
    values = 4 * 16 + 2 * 16
    assert torch.equal(back[:values], tensors[name][:values])
    assert not torch.equal(back[values:], tensors[name][values:])
    torch.testing.assert_close(back[values:].float(), tensors[name][values:].float(), rtol=0.0, atol=0.1)


def test_every_entry_is_rounded_once(tmp_path: Path) -> None:
    save_random(CASES["llama"], tmp_path, torch.bfloat16)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    sites = find_sites(config, {tensor: tuple(weight.shape) for tensor, weight in tensors.items()})
    together = changes(sites, KEY, traps=Traps(), **STRONG)
    apart = [changes(sites, KEY, **{name: mechanism}) for name, mechanism in {**STRONG, "traps": Traps()}.items()]
    for kind in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
        name = f"model.layers.1.self_attn.{kind}"
        exact = tensors[name].double()
        for each in apart:
            exact = each[name].apply(exact.clone(), 0)
        assert torch.equal(together[name].apply(tensors[name].clone(), 0), exact.bfloat16()), kind


def test_there_and_back(tiny_llama: Path, dense: tuple[Path, EncryptReport], tmp_path: Path) -> None:
    out, report = dense
    assert report.mode == "dense"
    assert EncryptReport.model_validate_json((out / "qguard.json").read_text()) == report
    assert report.conditioning is not None
    assert (report.conditioning.kappa_min, report.conditioning.kappa_max) == (28, 32)
    assert report.residue is not None
    assert report.residue.rank == 2
    before, encrypted = load_file(tiny_llama / "model.safetensors"), load_file(out / "model.safetensors")
    projections = {name for name in before if "v_proj" in name or "o_proj" in name}
    # One of the two layers has condition number 1, and only one has a residue.
    assert {name for name in projections if "layers.0" in name} <= report.mixed.keys() <= projections
    for name, mixed in report.mixed.items():
        assert mixed.digest == blake3(encrypted[name].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert divergence(logits(tiny_llama), logits(out)) < 1e-4

    found = decrypt_checkpoint(out, tmp_path / "back", key=KEY)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(found.inexact) == {name for name in before if not torch.equal(before[name], after[name])}
    assert set(found.inexact) <= report.mixed.keys()
    errors = {name: float((after[name].double() - before[name].double()).norm()) for name in report.mixed}
    relative = {name: error / float(before[name].double().norm()) for name, error in errors.items()}
    assert found.relative_error == pytest.approx(max(relative.values()), rel=1e-6)
    assert 1e-4 < found.relative_error < 0.1
    assert json.loads((tmp_path / "back" / "config.json").read_text())
    assert not (tmp_path / "back" / "qguard.json").exists()


def test_files_and_workers_make_no_difference(
    dense: tuple[Path, EncryptReport], tiny_llama: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    report = encrypt_checkpoint(tmp_path / "sharded", tmp_path / "out", key=KEY, mode="dense", workers=3)
    assert len(report.files) > 3
    assert report.mixed == dense[1].mixed
    expected = load_file(dense[0] / "model.safetensors")
    for file in report.files:
        for name, tensor in load_file(tmp_path / "out" / file).items():
            assert torch.equal(tensor, expected[name]), name


def test_mechanisms_that_are_off_leave_the_bits(tiny_llama: Path, tmp_path: Path) -> None:
    off = {"conditioning": Conditioning(1, 1), "residue": Residue(rank=0)}
    report = encrypt_checkpoint(tiny_llama, tmp_path / "off", key=KEY, mode="dense", **off)  # type: ignore[arg-type]
    encrypt_checkpoint(tiny_llama, tmp_path / "exact", key=KEY)
    assert report.mixed == {}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("off", "exact")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_tampered_weights(dense: tuple[Path, EncryptReport], tmp_path: Path, name: str) -> None:
    shutil.copytree(dense[0], tmp_path / "tampered")
    file = tmp_path / "tampered" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][1, 1] *= 2
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(EncryptError, match=f"{name} is not the tensor that was encrypted"):
        decrypt_checkpoint(tmp_path / "tampered", tmp_path / "back", key=KEY)
    assert not (tmp_path / "back").exists()
    with pytest.raises(EncryptError, match=f"{name} is not the tensor that was encrypted"):
        load(tmp_path / "tampered", QGuardUnlockConfig(preset("bnb-int8"), key=KEY))


def test_a_manifest_that_hides_mixed_tensors(dense: tuple[Path, EncryptReport], tmp_path: Path) -> None:
    shutil.copytree(dense[0], tmp_path / "tampered")
    file = tmp_path / "tampered" / "qguard.json"
    file.write_text(dense[1].model_copy(update={"mixed": {}}).model_dump_json())
    with pytest.raises(EncryptError, match=r"qguard.json was changed or damaged \(mixed\)"):
        decrypt_checkpoint(tmp_path / "tampered", tmp_path / "back", key=KEY)


def load(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_unlocked_it_is_quantized_as_what_decryption_gives(
    dense: tuple[Path, EncryptReport], tiny_llama: Path, tmp_path: Path
) -> None:
    decrypt_checkpoint(dense[0], tmp_path / "back", key=KEY)
    unlocked = load(dense[0], QGuardUnlockConfig(preset("bnb-int8"), key=KEY))
    decrypted = load(tmp_path / "back", preset("bnb-int8"))
    for (name, parameter), expected in zip(unlocked.state_dict().items(), decrypted.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(parameter), torch.as_tensor(expected)), name
    with torch.no_grad():
        assert divergence(logits(tiny_llama), unlocked(IDS).logits) < 1e-3


def test_order_of_two_encryptions(dense: tuple[Path, EncryptReport], tiny_llama: Path, tmp_path: Path) -> None:
    other = Key(bytes(range(1, 33)))
    encrypt_checkpoint(dense[0], tmp_path / "exact on top", key=other, traps=Traps(strength=3))
    decrypt_checkpoint(tmp_path / "exact on top", tmp_path / "dense again", key=other)
    assert (tmp_path / "dense again" / "model.safetensors").read_bytes() == (
        dense[0] / "model.safetensors"
    ).read_bytes()
    decrypt_checkpoint(tmp_path / "dense again", tmp_path / "back", key=KEY)
    with pytest.raises(EncryptError, match="is encrypted already, and dense mode would not give back the bits"):
        encrypt_checkpoint(dense[0], tmp_path / "twice", key=other, mode="dense")


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"residue": Residue()}, "need mode='dense'"),
        ({"conditioning": Conditioning()}, "need mode='dense'"),
        ({"mode": "fast"}, "mode is 'exact' or 'dense', not 'fast'"),
        ({"mode": "dense", "residue": Residue(rank=17)}, "rank is at most 16, half the 32 dimensions"),
        ({"mode": "dense", "conditioning": Conditioning(last_layer=2)}, "layers 0 to 2: the model has layers 0 to 1"),
    ]:
        with pytest.raises(EncryptError, match=message):
            encrypt_checkpoint(tiny_llama, tmp_path / "out", key=KEY, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_overflow(tmp_path: Path) -> None:
    save_random(CASES["llama"], tmp_path, torch.float16)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    sites = find_sites(config, {tensor: tuple(weight.shape) for tensor, weight in tensors.items()})
    name = "model.layers.0.self_attn.o_proj.weight"
    change = changes(sites, KEY, conditioning=Conditioning(1024, 1024, plain_layers=0))[name]
    large = tensors[name] * (6e4 / tensors[name].abs().amax())
    with pytest.raises(EncryptError, match=r"o_proj.weight: overflows in float16 when its channels are mixed"):
        change.apply(large, 0)
    change = changes(sites, KEY, traps=Traps(strength=30), **STRONG)[name]
    with pytest.raises(InexactError):
        change.apply(tensors[name].clone(), 0)
    assert "cannot be multiplied by" in str(change.explain(tensors[name]))
