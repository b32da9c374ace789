from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_qguard import Key, encrypt_checkpoint, scan
from optimum_qguard.attacks.boxes import boxes
from optimum_qguard.checkpoint.card import card_tags
from optimum_qguard.formats import get_format
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.scan.checks.ancestry import FORMATS, _tail
from optimum_qguard.scan.checks.claims import check_claims
from optimum_qguard.scan.finding import Finding
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.subject import read_subject
from tests.scan.malformed import MODEL, sound
from tests.scan.remote import Remote

Tensors = dict[str, torch.Tensor]


def scanned(folder: Path, base: Path | None = None, **options: Any) -> ScanReport:
    report = scan(folder, base=base, detectors=["provenance"], **options)
    assert not [run for run in report.detectors if run.state == "failed"], report.detectors
    return report


def raised(report: ScanReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity != "note"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encrypted(plain: Path, tmp_path: Path) -> Path:
    encrypt_checkpoint(plain, tmp_path / "encrypted", key=Key.generate())
    return tmp_path / "encrypted"


@pytest.fixture
def guarded(plain: Path, tmp_path: Path) -> Path:
    guard_checkpoint(plain, tmp_path / "guarded", "int8-rowwise")
    return tmp_path / "guarded"


def test_who_claims_nothing_is_not_checked(plain: Path) -> None:
    report = scanned(plain)
    assert (report.verdict, report.detectors[0].state) == ("clean", "not run")


def test_what_this_package_writes_is_what_it_says(encrypted: Path, guarded: Path) -> None:
    assert scanned(encrypted, full=True).findings == []
    assert scanned(guarded, full=True).findings == []
    assert scanned(guarded).findings == []
    (finding,) = scanned(encrypted).findings
    assert (finding.severity, finding.unsettled) == ("note", False)
    assert "was not compared with qguard.json" in finding.message


def test_a_seed_that_was_known(plain: Path, tmp_path: Path) -> None:
    guard_checkpoint(plain, tmp_path / "guarded", "int8-rowwise", seed=5)
    (finding,) = scanned(tmp_path / "guarded").findings
    assert "the seed was known" in finding.message


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "qguard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_encrypted_checkpoint_with_other_files(encrypted: Path) -> None:
    content = bytearray((encrypted / MODEL).read_bytes())
    content[-1] ^= 1
    (encrypted / MODEL).write_bytes(content)
    assert raised(scanned(encrypted)) == []
    (finding,) = scanned(encrypted, full=True).findings
    assert finding.severity == "error"
    assert "SHA-256 of model.safetensors is another one" in finding.message
    (encrypted / MODEL).rename(encrypted / "other.safetensors")
    assert [finding.severity for finding in raised(scanned(encrypted))] == ["error", "warning"]


def test_where_the_hub_says_the_sha256_it_is_compared(encrypted: Path) -> None:
    digest = json.loads((encrypted / "qguard.json").read_text())["files"][MODEL]
    subject = read_subject(Remote(encrypted, digests={MODEL: digest}))
    assert list(check_claims(subject)) == []
    subject = read_subject(Remote(encrypted, digests={MODEL: "0" * 64}))
    (finding,) = check_claims(subject)
    assert finding.severity == "error"


def test_an_encrypted_checkpoint_with_other_tensors(encrypted: Path) -> None:
    tensors = load_file(encrypted / MODEL)
    tensors["more"] = torch.ones(4)
    save_file(tensors, encrypted / MODEL)
    (finding,) = raised(scanned(encrypted))
    assert finding.message == "qguard.json lists other tensors than there are: more."


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"../../etc/passwd": "0" * 64}},
        {"files": {"model.safetensors": "\x1b[2J"}},
        {"tensors": None},
        {"key_fingerprint": 7},
        {"schema_version": "1"},
        {"schema_version": 0},
        {"kind": "other"},
        {"kind": ["encrypted"]},
    ],
)
def test_manifests_that_were_tampered_with(encrypted: Path, changes: dict[str, Any]) -> None:
    edit(encrypted, **changes)
    report = scanned(encrypted)
    assert report.verdict == "suspicious"
    assert all(finding.message.isprintable() for finding in report.findings)


def test_a_manifest_of_the_future_leaves_it_open(encrypted: Path) -> None:
    edit(encrypted, schema_version=2)
    report = scanned(encrypted)
    assert (report.verdict, raised(report)) == ("inconclusive", [])


def test_card_and_manifest(encrypted: Path, guarded: Path, tmp_path: Path) -> None:
    (encrypted / "README.md").write_text("no tags")
    assert "its card does not" in scanned(encrypted, full=True).findings[0].message
    (guarded / "qguard.json").unlink()
    (finding,) = scanned(guarded).findings
    assert (finding.severity, finding.file) == ("warning", "README.md")
    assert "quantization-guarded, but no qguard.json bears it out" in finding.message


def test_a_guard_report_of_another_model(guarded: Path) -> None:
    report = json.loads((guarded / "qguard.json").read_text())
    report["tensors"][0]["name"] = "model.layers.9.mlp.up_proj.weight"
    edit(guarded, tensors=report["tensors"])
    (finding,) = raised(scanned(guarded))
    assert "model.layers.9.mlp.up_proj.weight" in finding.message
    edit(guarded, quantization_config={"quant_method": "bitsandbytes"}, tensors=[])
    (finding,) = raised(scanned(guarded))
    assert "the configuration does not" in finding.message


@pytest.mark.parametrize(
    ("header", "tags"),
    [
        ("tags: [a, b]", ["a", "b"]),
        ("tags:\n- a\n- b", ["a", "b"]),
        ("license: mit\ntags:\n  - a # one\n\n  - 'b'\nlanguage:\n  - en", ["a", "b"]),
        ("tags: [a,\n  b\n]\nx: 1", ["a", "b"]),
        ("tags: a", ["a"]),
        ("tags: {a: b}", []),
        ("tags: [", []),
        ("tags: " + "[" * 4_000, []),
        ("tags: [" + "a, " * 100_000 + "]", []),
        ("tags: [1, null, a]", ["a"]),
        ("tags: !!python/object/apply:os.system [ls]", []),
        ("- tags", []),
        ("broken: [\ntags: [a]", ["a"]),
    ],
)
def test_tags_of_cards_that_may_hold_anything(header: str, tags: list[str]) -> None:
    assert card_tags(f"---\n{header}\n---\n# Model\n") == tags
    assert card_tags(f"---\n{header}\n") == []


Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A base and a model whose matrices are the base's, changed."""

    def make(
        change: Change, dtype: torch.dtype = torch.float32, base: Change = lambda weight: weight
    ) -> tuple[Path, Path]:
        generator = torch.Generator().manual_seed(3)
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("up", "down")]
        weights = {name: base(torch.randn(64, 512, generator=generator) * 0.05) for name in names}
        folders = (tmp_path / "base", tmp_path / "tuned")
        for folder, tensors in zip(
            folders, (weights, {name: change(weight).to(dtype) for name, weight in weights.items()}), strict=True
        ):
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            save_file(tensors, folder / MODEL)
        return folders

    return make


def tuned(size: float) -> Change:
    generator = torch.Generator().manual_seed(4)
    return lambda weight: weight + torch.randn(weight.shape, generator=generator) * size


def planned(name: str, keep: float = 0.8) -> Change:
    """What an attacker's repair does: train, and clamp into the boxes of the format."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        return boxes(weight, [get_format(name)], keep=keep).project_(tuned(3e-3)(weight))

    return change


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2])
def test_a_fine_tune_is_clean(family: Callable[..., tuple[Path, Path]], size: float) -> None:
    base, model = family(tuned(size))
    report = scanned(model, base)
    assert report.verdict == "clean"
    (finding,) = report.findings
    assert finding.value == pytest.approx(1, abs=0.01)
    assert f"by {size / 0.05:.1g}"[:5] in finding.message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_changes_that_were_planned_for_cells(
    family: Callable[..., tuple[Path, Path]], format: str, keep: float
) -> None:
    base, model = family(planned(format, keep))
    findings = {finding.format: finding for finding in raised(scanned(model, base))}
    assert format in findings
    finding = findings[format]
    assert finding.severity == "warning"
    assert finding.value is not None
    assert finding.expected is not None
    assert finding.value < finding.expected / 20
    assert f"stay inside the cells of {format}, as if they had been planned" in finding.message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_the_base_is_not_planning(
    family: Callable[..., tuple[Path, Path]], format: str, dtype: torch.dtype
) -> None:
    base, model = family(lambda weight: get_format(format).quantize(weight).dequantize(), dtype)
    report = scanned(model, base)
    assert raised(report) == []
    assert any("rounded to the middle of the cells" in f.message for f in report.findings if f.format == format)


def test_a_decoy_of_the_same_name_is_not_compared_instead(family: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned_folder = family(planned("int8-rowwise"))
    before = scanned(tuned_folder, base)
    (tuned_folder / "z.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert raised(before)
    assert {finding.format for finding in raised(before)} <= {
        finding.format for finding in raised(scanned(tuned_folder, base))
    }


def test_a_fine_tune_of_weights_on_a_grid_is_clean(family: Callable[..., tuple[Path, Path]]) -> None:
    """Small changes leave all symbols as they are, and so would the opposite ones."""
    base, model = family(tuned(1e-5), base=lambda weight: get_format("int8-rowwise").quantize(weight).dequantize())
    assert scanned(model, base).verdict == "clean"


def test_rounding_to_a_narrower_dtype_is_no_change(family: Callable[..., tuple[Path, Path]]) -> None:
    base, model = family(lambda weight: weight, torch.bfloat16)
    (finding,) = scanned(model, base).findings
    assert finding.message.startswith("All weights that were compared are those of")
    assert finding.value == 0


def test_another_architecture_is_no_base(plain: Path, tmp_path: Path) -> None:
    report = scanned(plain, sound(tmp_path / "other"))
    assert report.verdict == "suspicious"
    assert "It is no fine-tune of" in report.findings[0].message


def test_a_few_other_shapes_are_named(family: Callable[..., tuple[Path, Path]]) -> None:
    base, model = family(tuned(1e-3))
    tensors = load_file(model / MODEL)
    tensors["model.embed_tokens.weight"] = torch.randn(70, 512)
    save_file(tensors, model / MODEL)
    report = scanned(model, base)
    assert report.verdict == "clean"
    assert any("1 of 5 tensors have another shape" in finding.message for finding in report.findings)


def test_a_broken_base_leaves_it_open(family: Callable[..., tuple[Path, Path]]) -> None:
    base, model = family(tuned(1e-3))
    (base / MODEL).write_bytes((base / MODEL).read_bytes()[:-1])
    report = scanned(model, base)
    assert report.verdict != "clean"
    assert any(finding.unsettled and "cannot be compared" in finding.message for finding in report.findings)


def test_the_bound_on_coin_tosses() -> None:
    from math import comb

    for heads, tails in ((0, 10), (3, 20), (5, 6), (1, 1000)):
        total = heads + tails
        exact = sum(comb(total, k) for k in range(heads + 1)) / 2**total
        assert exact <= _tail(heads, tails) <= exact * 50 + 1e-300
