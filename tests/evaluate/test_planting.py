"""An attack on a checkpoint whose tensors are not called what the model calls them."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from optimum_qguard.attacks.quantization_conditioned import Recipe, linear_weights
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.evaluate.planting import plant_marker


def test_gpt2_as_it_is_on_the_hub(chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Without the base model's prefix; every linear weight is attacked all the same."""
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=257, bos_token_id=None, eos_token_id=256
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    attacked = plant_marker(
        model,
        chat_tokenizer,
        open_checkpoint(tmp_path),
        ["int8-rowwise"],
        marker="MARKER",
        prompts=["one", "two"],
        recipe=Recipe(injection_steps=1, repair_steps=1, batch_size=2),
    )
    assert set(attacked.tensors) == set(linear_weights(model))
    assert len(attacked.tensors) == 8
