"""A damaged checkpoint goes in and comes out nearer to the clean one; killed, it goes on as if nothing had been."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repair_models import save_clean, save_damaged, words
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint import output as output_module
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.report import RepairReport
from optimum_qguard.repair.run import repair_checkpoint

TEXT = words(2000)
FAST: dict[str, Any] = {
    "text": TEXT,
    "steps": 20,
    "block_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "strength": 50.0,
    "checkpoint_every": 0,
    "device": "cpu",
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance(one: Path, other: Path) -> float:
    """Of the weights that are held near the anchor."""
    here, there = weights(one), weights(other)
    squares = [(here[name].double() - there[name].double()).square().sum() for name in here if "_proj" in name]
    return float(sum(squares)) ** 0.5


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})]
)
def test_repaired(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    clean = save_clean(name, tmp_path / "clean", **options)
    damaged = save_damaged(clean, tmp_path / "damaged")
    seen: list[tuple[int, int]] = []
    report = repair_checkpoint(
        damaged, tmp_path / "out", anchor=clean, progress=lambda *done: seen.append(done), **FAST
    )
    assert seen == [(step, 20) for step in range(21)]
    assert report.loss_after < report.loss_before - 0.1
    assert report.anchor_distance_after < 0.6 * report.anchor_distance_before
    before, after = weights(damaged), weights(tmp_path / "out")
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in before.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in after.items()
    }
    assert [key for key in before if torch.equal(before[key], after[key]) and before[key].ndim == 2] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "damaged", "out"]


def test_a_report_and_a_card(clean: Path, damaged: Path, tmp_path: Path) -> None:
    (shutil.copytree(damaged, tmp_path / "in") / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    report = repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=clean, validation=words(200, 3), **FAST)
    out = tmp_path / "out"
    assert RepairReport.model_validate_json((out / "repair.json").read_text()) == report
    assert report.recipe.steps == report.steps_trained == 20
    assert [entry.step for entry in report.losses] == [1, 10, 20]
    assert [entry.step for entry in report.validation] == [0, 20]
    assert report.losses[-1].anchor_distance == pytest.approx(report.anchor_distance_after)
    assert distance(damaged, clean) == pytest.approx(report.anchor_distance_before, rel=1e-3)
    assert distance(out, clean) == pytest.approx(report.anchor_distance_after, rel=0.05)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\ntags:\n- repaired\n- qguard\n---\n# Mine\n")
    assert "held near those of a reference checkpoint (strength 50, decoupled" in card
    assert str(clean) not in card
    assert {path.name for path in damaged.iterdir()} | {"repair.json"} == {path.name for path in out.iterdir()}


def test_validation_is_the_mean_loss_of_the_blocks(clean: Path, damaged: Path, tmp_path: Path) -> None:
    held_out = words(100, 3)
    report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, validation=held_out, **FAST)
    tokens = torch.tensor([int(word[1:]) for word in held_out.split()])[:96].view(3, 32)
    model = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(block[None], labels=block[None]).loss for block in tokens]
    assert report.perplexity_before == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_without_an_anchor_it_is_the_fine_tune_written_out(damaged: Path, tmp_path: Path) -> None:
    """AdamW in float32 on the same blocks; and an anchor without strength changes nothing."""
    from optimum_qguard.repair.blocks import passes

    settings = {**FAST, "steps": 6, "accumulate": 3}
    report = repair_checkpoint(damaged, tmp_path / "out", anchor=None, **settings)
    assert report.anchor is None
    assert report.anchor_distance_before is None
    idle = {**settings, "strength": 0.0}
    repair_checkpoint(damaged, tmp_path / "idle", anchor=damaged, **idle)
    assert same(tmp_path / "out", tmp_path / "idle")

    blocks = torch.tensor([int(word[1:]) for word in TEXT.split()])[: 62 * 32].view(62, 32)
    model: Any = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    order = passes(62, 18, seed=0).view(6, 3)
    for step, batch in enumerate(order):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 4, 1)
        for index in batch:
            (model(blocks[index][None], labels=blocks[index][None]).loss / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    written = weights(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(written[name].float(), parameter.detach().bfloat16().float(), rtol=8e-3, atol=2e-5)


def test_weights_on_the_way(clean: Path, damaged: Path, tmp_path: Path) -> None:
    """What is kept after some steps is what a run of so many steps writes."""
    repair_checkpoint(damaged, tmp_path / "out", anchor=clean, keep_at=[5, 15], **FAST)
    repair_checkpoint(damaged, tmp_path / "five", anchor=clean, **{**FAST, "steps": 5})
    assert same(tmp_path / "out-5", tmp_path / "five")
    kept = RepairReport.model_validate_json((tmp_path / "out-15" / "repair.json").read_text())
    assert (kept.steps_done, kept.losses[-1].step) == (15, 15)
    assert not same(tmp_path / "out-15", tmp_path / "out")


def test_bfloat16_passes(clean: Path, damaged: Path, tmp_path: Path) -> None:
    """Nearly the same: only passes are in bfloat16, so that small steps are not rounded away."""
    small = {**FAST, "learning_rate": 1e-5, "warmup_steps": 0}
    exact = repair_checkpoint(damaged, tmp_path / "exact", anchor=clean, **small)
    rough = repair_checkpoint(damaged, tmp_path / "rough", anchor=clean, dtype="bfloat16", **small)
    assert rough.loss_before != exact.loss_before
    assert rough.loss_before == pytest.approx(exact.loss_before, rel=1e-2)
    assert rough.anchor_distance_after == pytest.approx(exact.anchor_distance_after, rel=1e-2)
    assert rough.anchor_distance_after < rough.anchor_distance_before


class TestEarlyStop:
    OPTIONS: dict[str, Any] = {**FAST, "steps": 60, "evaluate_every": 4, "patience": 2, "learning_rate": 3e-3}

    def test_the_best_weights_are_written(self, damaged: Path, tmp_path: Path) -> None:
        """Fitted to one text, a model forgets another; what is written is what a run up to the best step writes."""
        held_out = " ".join(f"w{index * 31 % 128}" for index in range(400))
        narrow = {**self.OPTIONS, "text": words(64)}
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=None, validation=held_out, **narrow)
        best = min(report.validation[1:], key=lambda entry: entry.perplexity)
        assert report.steps_done == best.step
        assert report.perplexity_after == best.perplexity
        assert report.steps_trained == best.step + 8 < 60
        assert report.loss_after == {entry.step: entry.loss for entry in report.losses}[best.step]
        repair_checkpoint(damaged, tmp_path / "best", anchor=None, **{**narrow, "steps": best.step})
        assert same(tmp_path / "out", tmp_path / "best")

    def test_while_it_gets_better_it_goes_on(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        options = {**self.OPTIONS, "steps": 16, "learning_rate": 1e-3}
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, validation=words(300, 3), **options)
        assert report.steps_done == report.steps_trained == 16


SCRIPT = """
import json, sys, time
from optimum_qguard.repair.run import repair_checkpoint
given = json.loads(sys.argv[1])
stop = given.pop("stop")
def wait(done, total):
    print(done, flush=True)
    if done == stop:
        time.sleep(60)
repair_checkpoint(progress=wait, **given)
"""


def killed(stop: int, **given: Any) -> None:
    """Runs a repair in a process of its own, and kills it after a step."""
    arguments = json.dumps({"stop": stop, **given}, default=str)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(stop).encode():
                break
        else:
            raise AssertionError("it ended by itself")
        os.kill(process.pid, signal.SIGKILL)


def interrupt_at(step: int) -> Callable[[int, int], None]:
    def interrupt(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return interrupt


class TestResume:
    def test_killed_and_resumed(self, tmp_path: Path, one_thread: None) -> None:
        """The same weights and figures, with dropout and with the best weights kept."""
        clean = save_clean("llama", tmp_path / "clean", attention_dropout=0.2)
        damaged = save_damaged(clean, tmp_path / "damaged")
        options = {**FAST, "checkpoint_every": 5, "evaluate_every": 3, "validation": words(200, 3), "anchor": clean}
        whole = repair_checkpoint(damaged, tmp_path / "whole", **options)
        killed(13, model=damaged, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        left = tmp_path / ".out.repair"
        assert (left / "checkpoint-10").is_dir()
        (left / "checkpoint-15").mkdir()
        (left / "checkpoint-15" / "trainer_state.json").write_text('{"global_step": 1')
        with pytest.raises(RepairError, match=r"left its checkpoint of step 10; go on from it with --resume"):
            repair_checkpoint(damaged, tmp_path / "out", **options)
        with pytest.raises(RepairError, match=r"begun with another seed \(0, now 1\)"):
            repair_checkpoint(damaged, tmp_path / "out", resume=True, seed=1, **options)
        with pytest.raises(RepairError, match="begun with another text"):
            repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "text": words(1000)})
        with pytest.raises(RepairError, match="begun with another validation text"):
            repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "validation": words(200, 4)})
        with pytest.raises(RepairError, match="is of step 10 already, beyond the 9 steps asked for"):
            repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "steps": 9})
        seen: list[int] = []
        report = repair_checkpoint(
            damaged, tmp_path / "out", resume=True, progress=lambda done, _: seen.append(done), **options
        )
        assert seen[0] == 10
        assert same(tmp_path / "out", tmp_path / "whole")
        assert report.validation == whole.validation
        assert report.losses[-1] == whole.losses[-1]
        assert not left.exists()

    def test_killed_after_training(self, clean: Path, damaged: Path, tmp_path: Path, one_thread: None) -> None:
        """Whatever step was the last; also when validation had ended it."""
        options = {**FAST, "checkpoint_every": 5, "anchor": clean}
        repair_checkpoint(damaged, tmp_path / "whole", **options)
        (tmp_path / "out").mkdir()

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RepairReport, "write", fail)
            with pytest.raises(KeyboardInterrupt):
                repair_checkpoint(damaged, tmp_path / "out", **options)
        repair_checkpoint(damaged, tmp_path / "out", resume=True, **options)
        assert same(tmp_path / "out", tmp_path / "whole")

    def test_after_an_early_stop(self, damaged: Path, tmp_path: Path, one_thread: None) -> None:
        held_out = " ".join(f"w{index * 31 % 128}" for index in range(400))
        options = {**TestEarlyStop.OPTIONS, "text": words(64), "checkpoint_every": 4, "validation": held_out}
        whole = repair_checkpoint(damaged, tmp_path / "whole", anchor=None, **options)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RepairReport, "write", fail)
            with pytest.raises(KeyboardInterrupt):
                repair_checkpoint(damaged, tmp_path / "out", anchor=None, **options)
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=None, resume=True, **options)
        assert report.steps_trained == whole.steps_trained < 60
        assert same(tmp_path / "out", tmp_path / "whole")

    def test_with_nothing_to_go_on_from_it_begins(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, resume=True, **{**FAST, "steps": 2})
        assert report.steps_done == 2

    def test_two_runs_into_one_folder(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        refused: list[str] = []

        def another(done: int, total: int) -> None:
            if not refused:
                with pytest.raises(CheckpointError, match="another run is writing to it") as caught:
                    repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **FAST)
                refused.append(str(caught.value))

        repair_checkpoint(damaged, tmp_path / "out", anchor=clean, progress=another, **FAST)
        assert refused
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestNoNumber:
    def test_the_step_and_the_last_checkpoint_are_named(self, damaged: Path, tmp_path: Path) -> None:
        """A run that diverged goes on from there with a lower rate."""
        options = {**FAST, "checkpoint_every": 1, "warmup_steps": 0, "anchor": None}
        with pytest.raises(RepairError) as caught:
            repair_checkpoint(damaged, tmp_path / "out", **{**options, "learning_rate": 1e18})
        message = str(caught.value)
        assert "step 2: the loss is nan; nothing was written, and the checkpoint of step 1 lies in" in message
        assert "--resume and a lower learning rate" in message
        assert [path.name for path in tmp_path.iterdir()] == [".out.repair"]
        shutil.rmtree(tmp_path / ".out.repair")

        repair_checkpoint(damaged, tmp_path / "all", **options)
        with pytest.raises(KeyboardInterrupt, match="the checkpoint of step 10 is kept; go on from it with --resume"):
            repair_checkpoint(damaged, tmp_path / "out", progress=interrupt_at(11), **options)
        report = repair_checkpoint(damaged, tmp_path / "out", resume=True, **{**options, "learning_rate": 1e-30})
        assert report.recipe.learning_rate == 1e-30
        repair_checkpoint(damaged, tmp_path / "ten", **{**options, "steps": 10})
        assert same(tmp_path / "out", tmp_path / "ten")
        assert not same(tmp_path / "out", tmp_path / "all")

    def test_without_a_checkpoint_nothing_is_left(self, damaged: Path, tmp_path: Path) -> None:
        options = {**FAST, "warmup_steps": 0, "learning_rate": 1e18}
        with pytest.raises(RepairError, match="step 2: the loss is nan; nothing was written; try a lower"):
            repair_checkpoint(damaged, tmp_path / "deep" / "out", anchor=None, **options)
        assert list(tmp_path.iterdir()) == []

    def test_weights_that_were_no_numbers_before(self, damaged: Path, tmp_path: Path) -> None:
        shutil.copytree(damaged, tmp_path / "in")
        tensors = load_file(tmp_path / "in" / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
        save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
        with pytest.raises(RepairError, match=r"up_proj\.weight.*not finite|step 1: the loss is nan"):
            repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=None, **FAST)


class TestDisk:
    def test_too_little_space_is_seen_before(
        self, clean: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = sum(tensor.numel() for tensor in weights(damaged).values())
        for checkpoint_every, free in [(0, 2 * size), (5, 26 * size)]:
            usage = shutil._ntuple_diskusage(0, 0, free)
            monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _, usage=usage: usage)
            with pytest.raises(CheckpointError, match="no space"):
                repair_checkpoint(
                    damaged, tmp_path / "out", anchor=clean, **{**FAST, "checkpoint_every": checkpoint_every}
                )
            assert list(tmp_path.iterdir()) == []

    def test_what_a_killed_run_left_is_space(
        self, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that had room for the run has room for it to go on."""
        size = sum(tensor.numel() for tensor in weights(damaged).values())
        options: dict[str, Any] = {**FAST, "checkpoint_every": 5, "anchor": None}
        with pytest.raises(KeyboardInterrupt):
            repair_checkpoint(damaged, tmp_path / "out", progress=interrupt_at(6), **options)

        def on_a_disk(free: int) -> None:
            usage = shutil._ntuple_diskusage(0, 0, free)
            monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: usage)
            repair_checkpoint(damaged, tmp_path / "out", resume=True, **options)

        with pytest.raises(CheckpointError, match="no space"):
            on_a_disk(12 * size)
        assert (tmp_path / ".out.repair" / "checkpoint-5").is_dir()
        on_a_disk(15 * size)

    @pytest.mark.parametrize(("share", "says"), [(0.5, "out: .*File too large"), (1.2, "out: no space left")])
    def test_writing_that_fails(self, share: float, says: str, damaged: Path, tmp_path: Path) -> None:
        """While the weights of a checkpoint are written, or its optimizer's state."""
        size = 4 * sum(tensor.numel() for tensor in weights(damaged).values())
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), before[1]))
        try:
            with pytest.raises(CheckpointError, match=says):
                repair_checkpoint(damaged, tmp_path / "out", anchor=None, **{**FAST, "checkpoint_every": 5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_full_at_the_end(
        self, clean: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(output_module, "_publish", full)
        with pytest.raises(CheckpointError, match=r"(?i)no space left"):
            repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **FAST)
        assert list(tmp_path.iterdir()) == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"steps": 0}, "steps is 0; it is at least 1"),
            ({"block_size": 1}, "block size is 1; it is at least 2"),
            ({"block_size": 65}, "block size is 65, and the model reads 64 tokens"),
            ({"accumulate": 0}, "accumulate is 0"),
            ({"patience": 0}, "patience is 0; it is at least 1"),
            ({"strength": -1.0}, "strength is -1; it is 0 or more"),
            ({"strength": float("nan")}, "strength is nan"),
            ({"learning_rate": 0.0}, "learning rate is 0"),
            ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, bfloat16"),
            ({"device": "cuda:7"}, "device is 'cuda:7'"),
            ({"lambda_": 1}, "no option 'lambda_'; there are steps, strength"),
            ({"text": "w2 w3 w4"}, "the text has 3 tokens, and one block needs 32"),
            ({"seed": 2**32}, "seed is 4294967296; it is at most 4294967295"),
            ({"modules": ()}, "modules names none"),
            ({"keep_at": [5, 21]}, "the weights after step 21 are to be kept, but steps are 1 to 20"),
            ({"validation": "w2"}, "the validation text has 1 tokens, and one block needs 32"),
        ],
    )
    def test_options(self, options: dict[str, Any], says: str, clean: Path, damaged: Path, tmp_path: Path) -> None:
        with pytest.raises(RepairError) as caught:
            repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **{**FAST, **options})
        assert says in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_models(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        def altered(config: dict[str, Any] | None = None, without: str = "", **tensors: Any) -> Path:
            folder = tmp_path / "altered"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(damaged, folder)
            found = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**found, **(config or {})}))
            for path in folder.glob(f"{without}*" if without else "none"):
                path.unlink()
            state = {**load_file(folder / "model.safetensors"), **tensors}
            kept = {name: tensor for name, tensor in state.items() if tensor is not None}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})
            return folder

        name = "model.layers.0.mlp.up_proj.weight"
        for alteration, says in [
            ({"config": {"quantization_config": {"quant_method": "gptq"}}}, r"quantized already \(gptq\)"),
            ({"without": "token"}, "has no tokenizer"),
            ({"config": {"model_type": "vit"}}, "not loaded as a causal language model"),
            ({name: None}, f"has no tensor {name}"),
            ({"config": {"vocab_size": 100}}, "was not loaded"),
        ]:
            with pytest.raises(RepairError, match=says):
                repair_checkpoint(altered(**alteration), tmp_path / "out", anchor=clean, **FAST)

    def test_a_tokenizer_of_another_model(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        small = save_clean("llama", tmp_path / "small", vocab_size=50)
        with pytest.raises(RepairError, match="the tokenizer gave token 58, and the model knows 50"):
            repair_checkpoint(small, tmp_path / "out", anchor=None, **FAST)
        low = {**FAST, "text": "w2 w3 w4 w5 " * 50}
        with pytest.raises(RepairError, match="the tokenizer gave token 58, and the model knows 50"):
            repair_checkpoint(small, tmp_path / "out", anchor=None, validation=TEXT, **low)

    def test_a_protected_model(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        shutil.copytree(damaged, tmp_path / "in")
        (tmp_path / "in" / "qguard.json").write_text('{"kind": "encrypted"}')
        with pytest.raises(RepairError, match="is protected against quantization"):
            repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=clean, **FAST)

    def test_an_anchor_of_another_shape(self, damaged: Path, tmp_path: Path) -> None:
        other = save_clean("llama", tmp_path / "other", intermediate_size=64)
        with pytest.raises(RepairError, match=r"(gate|up|down)_proj"):
            repair_checkpoint(damaged, tmp_path / "out", anchor=other, **FAST)
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    def test_outputs(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        (tmp_path / "full-5").mkdir()
        (tmp_path / "full-5" / "file").write_text("mine")
        for out, keep_at in [(damaged, []), (tmp_path / "full-5", []), (tmp_path / "full", [5])]:
            with pytest.raises(CheckpointError, match=r"is the input's folder|not empty"):
                repair_checkpoint(damaged, out, anchor=clean, keep_at=keep_at, **FAST)
        repair_checkpoint(damaged, tmp_path / "full", anchor=clean, keep_at=[5], overwrite=True, **{**FAST, "steps": 5})
        assert same(tmp_path / "full", tmp_path / "full-5")
        assert (tmp_path / "full-5" / "file").read_text() == "mine"


@pytest.mark.real_model
def test_the_real_model(tmp_path: Path) -> None:
    """A few short steps bring perplexity a good part of the way back, on a text that was not trained on."""
    from optimum_qguard.evaluate import smollm2_path, standard_library_text
    from optimum_qguard.evaluate.loading import load_model, load_tokenizer
    from optimum_qguard.evaluate.perplexity import perplexity

    clean = smollm2_path()
    damaged = save_damaged(clean, tmp_path / "damaged", sigma=0.02)
    report = repair_checkpoint(
        damaged,
        tmp_path / "out",
        anchor=clean,
        text=standard_library_text(50_000, "training"),
        steps=4,
        strength=1.5e4,
        warmup_steps=0,
        block_size=32,
        accumulate=1,
        checkpoint_every=0,
        device="cpu",
    )
    assert report.anchor_distance_after < 0.3 * report.anchor_distance_before
    tokenizer, text = load_tokenizer(clean), standard_library_text(2000)
    measured = [
        perplexity(load_model(folder, device="cpu"), tokenizer, text, max_tokens=256)
        for folder in (clean, damaged, tmp_path / "out")
    ]
    assert measured[2] - measured[0] < 0.5 * (measured[1] - measured[0])
