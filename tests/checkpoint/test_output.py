"""An output folder that is there whole or not at all."""

import errno
from pathlib import Path

import pytest

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint.output import check_output, output_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write_half(out: Path, source: Path) -> None:
    with output_folder(out, source, overwrite=True) as staging:
        (staging / "model.safetensors").write_text("new")
        raise KeyError("broken")


@pytest.mark.parametrize("name", ["out", "new/folder/out"])
def test_after_an_error_nothing_is_left(tmp_path: Path, source: Path, name: str) -> None:
    before = everything(tmp_path)
    with pytest.raises(KeyError):
        write_half(tmp_path / name, source)
    assert everything(tmp_path) == before


def test_after_an_error_an_overwritten_folder_is_as_it_was(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    before = everything(tmp_path)
    with pytest.raises(KeyError):
        write_half(out, source)
    assert everything(tmp_path) == before


def test_overwriting_leaves_no_record_of_the_old_weights(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("qguard.json", "repair.json", "tokenizer.json"):
        (out / name).write_text("old")
    with output_folder(out, source, overwrite=True) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "repair.json").write_text("new")
    assert everything(out) == {"model.safetensors": b"new", "repair.json": b"new", "tokenizer.json": b"old"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_line(tmp_path: Path, source: Path, error: Exception) -> None:
    with pytest.raises(CheckpointError, match="no space left"), output_folder(tmp_path / "out", source):
        raise error
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with output_folder(tmp_path / "out", source) as staging:
        (staging / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("target", ["mine", "nowhere"])
def test_a_link_in_the_temporary_folders_place_is_not_followed(tmp_path: Path, source: Path, target: str) -> None:
    """In a folder that others may write to, it could lead anywhere, and what is there would be deleted."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / target)
    with (
        pytest.raises(CheckpointError, match=r"\.out\.partial is a link, and is not followed; delete it"),
        output_folder(tmp_path / "out", source),
    ):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_a_link_that_a_killed_run_left_is_deleted_and_not_what_it_leads_to(tmp_path: Path, source: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "link").symlink_to(tmp_path / "mine")
    with output_folder(tmp_path / "out", source) as staging:
        assert list(staging.iterdir()) == []
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("name", ["a" * 300, "~no-such-user/out"])
def test_a_name_that_cannot_be_looked_at(tmp_path: Path, source: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written to \(.*\); name another folder"):
        check_output(name if name[0] == "~" else tmp_path / name, source)
