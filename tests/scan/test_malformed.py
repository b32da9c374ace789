"""No repository, however it is made, breaks a scan, is called clean for want of looking, or talks to the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimum_qguard import scan
from optimum_qguard.scan.writers import get_writer
from tests.scan.malformed import REPOSITORIES, sharded, sound


@pytest.mark.parametrize("build", REPOSITORIES.values(), ids=REPOSITORIES)
def test_never_clean_and_never_a_crash(build: object, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    build(folder)  # type: ignore[operator]
    for full in (False, True):
        report = scan(folder, full=full, detectors=["integrity", "provenance"])
        assert report.verdict != "clean"
        assert not [run for run in report.detectors if run.state == "failed"], report.detectors
        assert report.reason.isprintable()
        assert all(finding.message.isprintable() for finding in report.findings)
        assert all((finding.file or "").isprintable() for finding in report.findings)
        text = get_writer("json")([report])
        assert text.replace("\n", "").isprintable()
    assert not Path("/tmp/qguard-was-here").exists()


def test_sound_repositories_are_clean(tmp_path: Path) -> None:
    """With the same detectors, so that the others' test is worth something."""
    for folder in (sound(tmp_path / "one"), sharded(tmp_path / "two")):
        report = scan(folder, detectors=["integrity", "provenance"])
        assert (report.verdict, report.findings) == ("clean", [])
