"""A damaged checkpoint goes in and comes out nearer to the clean one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from repair_models import save_clean, save_damaged, words
from runs import EARLY_STOP, FAST, TEXT, distance, same, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.repair import anchor as anchor_module
from optimum_qguard.repair.report import RepairReport
from optimum_qguard.repair.run import repair_checkpoint


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


def test_what_guard_makes_of_a_model_is_repaired_with_itself_as_anchor(damaged: Path, tmp_path: Path) -> None:
    """Its report is about weights that are no longer there."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    guard_checkpoint(damaged, reference, "int8-rowwise", seed=0)
    report = repair_checkpoint(reference, out, anchor=reference, **FAST)
    assert report.anchor_distance_before == 0 < report.anchor_distance_after
    assert (reference / "qguard.json").exists()
    assert not (out / "qguard.json").exists()
    assert (out / "repair.json").exists()


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


def test_a_perplexity_beyond_all_numbers(damaged: Path, tmp_path: Path) -> None:
    """A head that is a million times too large; the report says that there is none, also as JSON."""
    shutil.copytree(damaged, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    options = {**FAST, "steps": 2, "validation": words(64, 3)}
    report = repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=None, **options)
    assert [entry.perplexity for entry in report.validation] == [None, None]
    assert "perplexity" not in str(report)
    assert RepairReport.model_validate_json((tmp_path / "out" / "repair.json").read_text()) == report


def test_one_module_need_not_be_a_list(clean: Path, damaged: Path, tmp_path: Path) -> None:
    report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, modules="q_proj", **{**FAST, "steps": 1})
    assert report.recipe.modules == ("q_proj",)


def test_the_anchor_is_read_through_once_before_training(
    clean: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = anchor_module._check

    def counted(reader: Any, stored: Any, *arguments: Any) -> None:
        checked.append(stored.names[0])
        check(reader, stored, *arguments)

    monkeypatch.setattr(anchor_module, "_check", counted)
    repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **{**FAST, "steps": 1})
    assert len(checked) == len(set(checked)) == 14


class TestEarlyStop:
    def test_the_best_weights_are_written(self, damaged: Path, tmp_path: Path) -> None:
        """Fitted to one text, a model forgets another; what is written is what a run up to the best step writes."""
        held_out = " ".join(f"w{index * 31 % 128}" for index in range(400))
        narrow = {**EARLY_STOP, "text": words(64)}
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=None, validation=held_out, **narrow)
        best = min(report.validation[1:], key=lambda entry: entry.perplexity)
        assert report.steps_done == best.step
        assert report.perplexity_after == best.perplexity
        assert report.steps_trained == best.step + 8 < 60
        assert report.loss_after == {entry.step: entry.loss for entry in report.losses}[best.step]
        repair_checkpoint(damaged, tmp_path / "best", anchor=None, **{**narrow, "steps": best.step})
        assert same(tmp_path / "out", tmp_path / "best")

    def test_while_it_gets_better_it_goes_on(self, clean: Path, damaged: Path, tmp_path: Path) -> None:
        options = {**EARLY_STOP, "steps": 16, "learning_rate": 1e-3}
        report = repair_checkpoint(damaged, tmp_path / "out", anchor=clean, validation=words(300, 3), **options)
        assert report.steps_done == report.steps_trained == 16


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
