"""Rounding to the nearest is as harmless as errors of its size are, unless somebody planned otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard import scan
from optimum_qguard.attacks.perturbation_triggered import plant_trigger
from optimum_qguard.evaluate.smollm2 import smollm2_path
from optimum_qguard.formats import get_format
from optimum_qguard.scan.detectors.quantization_gap import DRAWS, Gap, measure_gap, measure_response, spreads_of
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.rounding import FORMATS, Weights
from optimum_qguard.scan.running import LENGTH, PROMPTS, Run

SIZE, VOCABULARY = 128, 512


def tiny_model() -> Any:
    """A random Llama whose activations have a mean, as those of trained models do, and whose logits are not flat."""
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight += torch.randn(SIZE).sign() * 0.3
            model.lm_head.weight *= 3
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3").save_pretrained(folder)
    return folder


def plant(model: Any, format: str) -> None:
    """Move weights towards the edges of their cells, so that rounding adds the same direction to every output."""
    direction = model.model.embed_tokens.weight.mean(0).sign()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            weight = linear.weight
            lower, upper = get_format(format).quantize(weight.detach()).bounds()
            target = torch.where(direction > 0, lower + 0.1 * (upper - lower), upper - 0.1 * (upper - lower))
            largest = weight.abs() == weight.abs().amax(1, keepdim=True)
            weight.data = torch.where(largest, weight, target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            model = tiny_model()
            if kind == "planted":
                plant(model, "int8-rowwise")
            elif kind == "triggered":
                ids = torch.randint(3, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
                plant_trigger(model, ids, 77)
            folders[kind] = save(model, tmp_path_factory.mktemp(kind) / "model")
        return folders[kind]

    return make


def scanned(folder: Path, **options: Any) -> ScanReport:
    report: ScanReport = scan(folder, detectors=["quantization_gap"], seed=1, **options)
    return report


def test_a_clean_model_has_a_gap_of_about_one_in_every_format(saved: Callable[[str], Path]) -> None:
    run = Run(saved("clean"))
    weights = Weights(run.model)
    assert float(run.divergences().max()) < 1e-9
    gaps = [measure_gap(run, weights, format, 1) for format in FORMATS]
    spreads, freedom = spreads_of(gaps)
    assert freedom == len(FORMATS) * (DRAWS - 1)
    for gap in gaps:
        assert gap.nearest.shape == (len(PROMPTS), LENGTH)
        assert 0.2 < gap.value < 5, gap.format
        assert min(gap.p_values(spreads, freedom)) > 1e-3, gap.format
    response = measure_response(run, weights, 1)
    assert response.value == pytest.approx(response.expected, rel=0.2)
    assert response.p_value > 0.1
    weights.restore()
    assert float(run.divergences().max()) < 1e-9


def test_a_clean_model_is_clean(saved: Callable[[str], Path]) -> None:
    report = scanned(saved("clean"), deep=True)
    assert report.verdict == "clean", report
    gaps, response = report.plots
    assert gaps.expected == [1.0] * len(FORMATS)
    assert len(gaps.y) == len(FORMATS)
    assert response.expected is not None
    assert response.y == pytest.approx(response.expected, rel=0.2)


def test_what_was_planted_for_rounding_to_the_nearest_is_found(saved: Callable[[str], Path]) -> None:
    report = scanned(saved("planted"), deep=True)
    assert report.verdict == "suspicious"
    worst = max(report.findings, key=lambda finding: finding.value or 0)
    assert worst.format == "int8-rowwise"
    assert worst.severity == "error"
    assert worst.value is not None
    assert worst.value > 3
    assert worst.expected == 1.0


def test_what_any_change_sets_off_is_found(saved: Callable[[str], Path]) -> None:
    report = scanned(saved("triggered"), deep=True)
    assert report.verdict == "suspicious"
    assert any(finding.statistic and "noise" in finding.statistic for finding in report.findings), report.findings


def test_weights_on_a_grid_are_said_to_be(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved("clean"))
    Weights(model).quantize("nf4")
    report = scanned(save(model, tmp_path / "model"), deep=True)
    assert report.verdict == "clean", report
    notes = [finding for finding in report.findings if "on its grid" in finding.message]
    assert [note.format for note in notes] == ["nf4"]


def test_a_quick_scan_does_not_run_the_model(saved: Callable[[str], Path]) -> None:
    (run,) = scanned(saved("planted")).detectors
    assert run.state == "not run"


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_a_model_that_cannot_be_run_is_not_called_clean(missing: str, tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    (folder / missing).unlink()
    report = scanned(folder, deep=True)
    assert report.verdict == "inconclusive"
    assert "could not be run" in report.reason
    (run,) = report.detectors
    assert run.state == "not run"
    assert run.reason is not None


def test_no_code_of_the_repository_is_run(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: ...\nclass Config: ...\n")
    config = (folder / "config.json").read_text()
    auto_map = '"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},'
    (folder / "config.json").write_text(config.replace('"llama"', '"evil"').replace("{", "{" + auto_map, 1))
    assert scanned(folder, deep=True).verdict == "inconclusive"
    assert not ran.exists()


def gap(nearest: torch.Tensor, draws: float = 0.1) -> Gap:
    """Whose signs have a KL of about one, that differs so much from draw to draw."""
    generator = torch.Generator().manual_seed(0)
    common = (draws * torch.randn(DRAWS, 1, 1, generator=generator)).exp()
    answers = (0.3 * torch.randn(DRAWS, *nearest.shape, generator=generator)).exp()
    return Gap("nf4", nearest.double(), (common * answers).double())


def test_nothing_is_said_of_differences_too_small_to_measure() -> None:
    tiny = Gap("nf4", torch.full((len(PROMPTS), LENGTH), 1e-7), torch.full((DRAWS, len(PROMPTS), LENGTH), 1e-9))
    assert tiny.p_values(*spreads_of([tiny])) == (1, 1)


def test_one_answer_in_many_is_no_proof_and_neither_is_one_draw() -> None:
    one = torch.ones(len(PROMPTS), LENGTH)
    single = one.clone()
    single[0] = 100
    assert gap(single).p_values({4: 0.1, LENGTH: 0.1}, 14)[0] > 1e-3
    assert gap(4 * one).p_values({4: 0.1, LENGTH: 0.1}, 14)[0] < 1e-5
    assert gap(4 * one).p_values({4: 1.0, LENGTH: 1.0}, 14)[0] > 1e-2
    assert gap(one / 1000).p_values({4: 0.1, LENGTH: 0.1}, 14)[1] < 1e-9


def test_the_spread_is_that_of_the_draws() -> None:
    gaps = [gap(torch.ones(len(PROMPTS), LENGTH), draws) for draws in (0.0, 0.5)]
    quiet, loud = (spreads_of([each])[0][LENGTH] for each in gaps)
    assert quiet < 0.1
    assert 0.2 < loud < 1


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_model_is_clean() -> None:
    assert scanned(smollm2_path(off_grid=True), deep=True).verdict == "clean"
