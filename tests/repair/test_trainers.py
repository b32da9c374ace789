"""The callback in trainers and modes that people use: trl's, mixed precision, several processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from repair_models import save_tokenizer
from safetensors.torch import load_file
from test_anchor import EXAMPLES, STRENGTH, llama, penalty, train
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from optimum_qguard import AnchorCallback, AnchorTrainer
from optimum_qguard.repair.anchor import Anchor

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers") / "llama"
    llama(1).to(torch.bfloat16).save_pretrained(folder)
    return folder


def stepped(model: Any, anchor: Anchor, batches: Any, *, bfloat16: bool = False) -> Any:
    """Gradient descent on the loss with the penalty in it, written out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**batch).loss
        (loss + STRENGTH * penalty(model, anchor)).backward()
        optimizer.step()
    return model


def assert_same(model: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).data, parameter.data, rtol=1e-4, atol=tolerance)


def test_mixed_precision(clean: Path, tmp_path: Path) -> None:
    """Passes in bfloat16; the penalty's gradient is float32, like the weights."""
    model, by_hand = llama(), llama()
    trained = train(model, tmp_path, AnchorCallback(clean, strength=STRENGTH), bf16=True)
    anchor = Anchor.open(clean, by_hand)
    batches = list(trained.get_train_dataloader())[:4]
    assert_same(model, stepped(by_hand, anchor, batches, bfloat16=True), 1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_trl(clean: Path, tmp_path: Path) -> None:
    model, by_hand, plain = llama(), llama(), llama()
    save_tokenizer(tmp_path)

    def sft(trained: Any, *callbacks: Any) -> SFTTrainer:
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=1,
            learning_rate=0.05,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        rows = [{"input_ids": example["input_ids"].tolist()} for example in EXAMPLES]
        made = SFTTrainer(
            trained,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tmp_path),
            callbacks=list(callbacks),
        )
        made.train()
        return made

    trainer = sft(model, AnchorCallback(clean, strength=STRENGTH))
    sft(plain)
    batches = [{name: batch[name] for name in ("input_ids", "labels")} for batch in trainer.get_train_dataloader()][:4]
    anchor = Anchor.open(clean, by_hand)
    assert_same(model, stepped(by_hand, anchor, batches))
    assert anchor.distance(model) < 0.995 * anchor.distance(plain)
    assert [entry["anchor_distance"] for entry in trainer.state.log_history if "loss" in entry][-1] == pytest.approx(
        anchor.distance(model)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_launched(kind: str, clean: Path, tmp_path: Path) -> None:
    """Two processes with one example each a step end with the weights of one process with two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, HERE / "launched.py", kind, clean, tmp_path / "out.safetensors"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "out.safetensors")
    for decoupled in (False, True):
        model = llama()
        options = {"anchor": clean, "anchor_strength": 2.0 if decoupled else STRENGTH, "anchor_decoupled": decoupled}
        trainer = train(model, tmp_path, trainer=AnchorTrainer, per_device_train_batch_size=2, **options)
        logged = [entry for entry in trainer.state.log_history if "anchor_distance" in entry][-1]
        assert got[f"{decoupled}.distance"].item() == pytest.approx(logged["anchor_distance"], rel=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[f"{decoupled}.{name}"], parameter.data, rtol=1e-4, atol=1e-6)
