from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from optimum_qguard.checkpoint import CheckpointError, atomic_write


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "größe\r\n")
    atomic_write(tmp_path / "b", b"\xff\0")
    assert (tmp_path / "a").read_bytes() == "größe\r\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff\0"
    assert len(list(tmp_path.iterdir())) == 2


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    previous = os.umask(0o027)
    try:
        atomic_write(path, "1")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    atomic_write(path, "2")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("old")
    (tmp_path / "a").symlink_to("blob")
    atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "blob").read_text() == "old"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=r"a: cannot be written: File too large"):
            atomic_write(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        atomic_write(tmp_path / "none" / "a", "x")
