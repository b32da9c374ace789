"""Recipes leave the function as it is, and undo what they should undo."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.rebalance import RECIPES, rebalance_checkpoint
from optimum_qguard.encrypt.conditioning import Conditioning
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.formats import get_format

KEY = Key(bytes(range(32)))
IDS = torch.arange(24).view(2, 12) * 17 % 512
TEXT = " ".join(f"w{index * 7 % 512}" for index in range(100))
DENSE: dict[str, Any] = {"mode": "dense", "conditioning": Conditioning(plain_layers=0)}


@pytest.fixture(scope="module")
def save(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random model like the tiny Llama, with a tokenizer of words, in some dtype and with some options."""

    def made(dtype: torch.dtype, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("plain") / "model"
        config = AutoConfig.from_pretrained(tiny_llama, **options)
        generator = torch.Generator().manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                noise = torch.randn(tensor.shape, generator=generator)
                spread = 0.1 if name.endswith("bias") else 0.2 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
                tensor.copy_(noise * spread + ("norm" in name))
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
        return folder

    return made


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(IDS).logits
    return found


@torch.no_grad()
def int8_divergence(folder: Path, reference: torch.Tensor) -> float:
    """Of the model with the linears of its layers rounded to a scale a row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for name, parameter in model.named_parameters():
        if "_proj.weight" in name:
            weight = get_format("int8-rowwise").quantize(parameter.float()).dequantize()
            parameter.copy_(weight)
    p, q = (each.double().log_softmax(-1) for each in (reference, model(IDS).logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 4, "attention_bias": True}], ids=["grouped", "biases"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_function_stays(save: Callable[..., Path], tmp_path: Path, recipe: str, options: dict[str, Any]) -> None:
    folder = save(torch.float64, **options)
    encrypt_checkpoint(folder, tmp_path / "in", key=KEY, traps=Traps(strength=4), **DENSE)
    rebalance_checkpoint(tmp_path / "in", tmp_path / "out", [recipe], text=TEXT)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before if "layers" not in name)
    # Norms compute in float32.
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=1e-6, atol=1e-6)


def test_powers_of_two_leave_every_bit_and_undo_the_traps(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(torch.bfloat16)
    expected = logits(folder)
    encrypt_checkpoint(folder, tmp_path / "exact", key=KEY)
    rebalance_checkpoint(tmp_path / "exact", tmp_path / "out", ["power-of-two"])
    assert torch.equal(logits(tmp_path / "out"), expected)
    plain, broken, undone = (int8_divergence(each, expected) for each in (folder, tmp_path / "exact", tmp_path / "out"))
    assert not broken < 100 * plain
    assert undone < 3 * plain


def test_svd_undoes_dense_mode_between_values_and_output(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(torch.float32)
    expected = logits(folder)
    kappa = Conditioning(4096, 4096, plain_layers=0)
    encrypt_checkpoint(folder, tmp_path / "dense", key=KEY, mode="dense", conditioning=kappa)
    found = {}
    for recipes in (["power-of-two"], ["power-of-two", "svd"]):
        out = tmp_path / "-".join(recipes)
        rebalance_checkpoint(tmp_path / "dense", out, recipes)
        found[len(recipes)] = int8_divergence(out, expected)
    plain = int8_divergence(folder, expected)
    assert found[1] > 10 * plain, "scaling single channels undoes it"
    assert found[2] < 3 * plain


def test_recipes_do_what_their_names_say(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(torch.float32)
    before = load_file(folder / "model.safetensors")
    layer = "model.layers.1."
    for recipe in RECIPES:
        rebalance_checkpoint(folder, tmp_path / recipe, [recipe], text=TEXT)
    after = {recipe: load_file(tmp_path / recipe / "model.safetensors") for recipe in RECIPES}
    changed = {
        recipe: {
            name.removeprefix(layer)
            for name in before
            if name.startswith(layer) and (before[name] != tensors[name]).any()
        }
        for recipe, tensors in after.items()
    }
    heads, mlp = {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}, {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"}
    norms |= {f"self_attn.{name}_proj.weight" for name in "qkv"}
    assert changed["equalization"] == heads | mlp
    assert changed["smoothquant"] == changed["fuse-norms"] == norms
    assert changed["awq"] == norms | mlp
    assert changed["awq-grouped"] == norms | mlp | heads
    assert changed["rotate-heads"] == changed["svd"] == heads

    up, down = (after["equalization"][f"{layer}mlp.{name}_proj.weight"].abs() for name in ("up", "down"))
    torch.testing.assert_close(up.amax(1), down.amax(0), rtol=1e-5, atol=0)
    assert after["fuse-norms"][f"{layer}input_layernorm.weight"].unique().tolist() == [1]
    value, output = (after["svd"][f"{layer}self_attn.{name}_proj.weight"].double() for name in "vo")
    for group in range(2):
        v = torch.linalg.svdvals(value.view(2, 32, -1)[group])
        o = torch.linalg.svdvals(output.view(128, 2, 2, 32)[:, group].transpose(0, 1).reshape(-1, 32))
        torch.testing.assert_close(v, o, rtol=1e-4, atol=1e-4)  # balanced


def test_refusals(tiny_llama: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(torch.float32)
    for recipes, message in [
        (["magic"], "no recipe is called 'magic'; there are equalization, "),
        (["awq"], "give a text"),
        (["svd", "awq"], "name them first"),
    ]:
        text = TEXT if len(recipes) > 1 else None
        with pytest.raises(AttackError, match=message):
            rebalance_checkpoint(folder, tmp_path / "out", recipes, text=text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(AttackError, match="is of type 'gpt2'; this knows llama, mistral, qwen2 only"):
        rebalance_checkpoint(folder, tmp_path / "out", ["svd"])
    assert not list(tmp_path.iterdir())
