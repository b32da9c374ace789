import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.attacks.fine_tuning import fine_tune_checkpoint
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import encrypt_checkpoint

TEXT = " ".join(f"w{index % 7}" for index in range(200))
train = partial(fine_tune_checkpoint, text=TEXT, steps=8, tokens_per_step=16)


@pytest.fixture
def original(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    shutil.copytree(tiny_llama, folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def test_it_learns_the_text_and_keeps_the_dtype(original: Path, tmp_path: Path) -> None:
    losses = fine_tune_checkpoint(
        original, tmp_path / "out", text=TEXT, steps=8, tokens_per_step=16, learning_rate=1e-3
    )
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert not torch.equal(tensor, before[name]), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


def test_traps_do_not_change_what_is_trained_on_but_where_training_leads(original: Path, tmp_path: Path) -> None:
    learned = tmp_path / "learned"
    train(original, learned, learning_rate=3e-3)
    encrypt_checkpoint(learned, tmp_path / "encrypted", key=Key(bytes(32)))
    plain, encrypted = (
        train(folder, tmp_path / "out", overwrite=True, learning_rate=1e-4)
        for folder in (learned, tmp_path / "encrypted")
    )
    assert encrypted[0] == plain[0]
    assert not encrypted[-1] < plain[-1] + 1, "worse, or not a number"


def test_what_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(AttackError, match="the text has 200 tokens, and 24 steps of 64 need 1536"):
        fine_tune_checkpoint(original, tmp_path / "out", text=TEXT)
    for wrong in ({"steps": 0}, {"tokens_per_step": 1}, {"learning_rate": float("nan")}):
        with pytest.raises(AttackError, match="needs at least one step"):
            fine_tune_checkpoint(original, tmp_path / "out", text=TEXT, **wrong)
    with pytest.raises(CheckpointError):
        fine_tune_checkpoint(tmp_path / "missing", tmp_path / "out", text=TEXT)
    assert not (tmp_path / "out").exists()
