"""Hub repositories by range requests: exactly what was asked for, whatever the server does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_server import OTHER_TOKEN, HubServer
from hub_server.store import Blob
from huggingface_hub import constants

from optimum_qguard.checkpoint import CheckpointError, connection
from optimum_qguard.checkpoint.hub import download_snapshot
from optimum_qguard.checkpoint.repository import HubRepository, open_repository

CONTENT = bytes(range(251)) * 1000
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def _short_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.002)


@pytest.fixture
def repository(hub: HubServer) -> HubRepository:
    hub.add_repository("org/model", {FILE: CONTENT, "config.json": b"{}", "a b/ü.txt": b"text"})
    found = open_repository("org/model")
    assert isinstance(found, HubRepository)
    hub.requests.clear()
    return found


def error_of(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_in_it(hub: HubServer, repository: HubRepository) -> None:
    assert (repository.name, repository.revision) == ("org/model", hub.head("org/model"))
    assert list(repository.files) == [".gitattributes", "a b/ü.txt", "config.json", FILE]
    assert repository.files[FILE].size == len(CONTENT)
    assert repository.files[FILE].sha256 == Blob(CONTENT).sha256
    assert repository.files["config.json"].sha256 is None
    assert repository.local_folder is None


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (100, 70_000), (len(CONTENT) - 5, 100), (7, None), (0, None), (0, 0), (10**9, 5)]
)
def test_reads_what_was_asked_for_and_no_more(
    hub: HubServer, repository: HubRepository, start: int, length: Any
) -> None:
    wanted = CONTENT[start:] if length is None else CONTENT[start : start + length]
    assert repository.read(FILE, start, length) == wanted
    sent = [request.sent for request in hub.requests if request.status == 206]
    assert repository.bytes_read == sum(sent) == len(wanted)


def test_small_files_and_odd_names(repository: HubRepository) -> None:
    assert repository.read("config.json") == b"{}"
    assert repository.read("a b/ü.txt", 1, 2) == b"ex"
    assert "has no file nothing" in error_of(repository.read, "nothing")


def test_one_commit_whatever_happens_to_the_branch(hub: HubServer, repository: HubRepository) -> None:
    hub.commit("org/model", {"config.json": b"new", FILE: b"short"})
    assert repository.read("config.json") == b"{}"
    assert repository.read(FILE, 5, 5) == CONTENT[5:10]
    assert open_repository(f"org/model@{repository.revision}").read("config.json") == b"{}"
    assert open_repository("org/model", revision="main").read("config.json") == b"new"
    hub.commit("org/model", {"config.json": b"proposed"}, "refs/pr/1")
    assert open_repository("org/model@refs/pr/1").read("config.json") == b"proposed"
    assert (download_snapshot("org/model@refs/pr/1") / "config.json").read_bytes() == b"proposed"
    assert "give one" in error_of(open_repository, "org/model@main", revision="main")


def test_the_address_of_a_large_file_is_asked_for_once_and_again_when_it_expires(
    hub: HubServer, repository: HubRepository
) -> None:
    for start in range(5):
        repository.read(FILE, start, 3)
    assert [request.path.split("/")[1] for request in hub.requests] == ["org", *["cdn"] * 5]
    assert [request.authorized for request in hub.requests] == [True, *[False] * 5]
    hub.requests.clear()
    hub.fail("GET /cdn/", status=403)
    assert repository.read(FILE, 9, 3) == CONTENT[9:12]
    assert [request.status for request in hub.requests] == [403, 302, 206]


def test_connections_are_used_again_by_many_threads(hub: HubServer, repository: HubRepository) -> None:
    before = hub.connections
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda n: repository.read(FILE, n * 100, 100), range(100)))
    assert b"".join(parts) == CONTENT[:10_000]
    assert hub.connections - before <= 8


def test_pages_of_a_long_list(hub: HubServer) -> None:
    hub.page_size = 7
    hub.add_repository("org/model", {f"{n:03}.txt": b"" for n in range(50)})
    assert len(open_repository("org/model").files) == 51


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "times": 3},
        {"status": 500, "times": 5},
        {"status": 429, "headers": {"Retry-After": "0"}, "times": 4},
        {"drop": True, "times": 2},
        {"cut_after": 0},
        {"cut_after": 30_000, "times": 3},
    ],
)
def test_tried_again_until_all_is_there(hub: HubServer, repository: HubRepository, fault: dict[str, Any]) -> None:
    hub.fail("GET /(cdn|org)/", **fault)
    assert repository.read(FILE, 1000, 150_000) == CONTENT[1000:151_000]


def test_taken_up_at_the_byte_that_was_reached(hub: HubServer, repository: HubRepository) -> None:
    hub.fail("GET /cdn/", cut_after=65_536, times=2)
    assert repository.read(FILE) == CONTENT
    ranges = [request.range for request in hub.requests if "/cdn/" in request.path]
    assert ranges == [f"bytes={start}-250999" for start in (0, 65_536, 131_072)]
    assert hub.bytes_sent("/cdn/") == len(CONTENT)


def test_given_up_in_the_end(hub: HubServer, repository: HubRepository) -> None:
    hub.fail("GET /(cdn|org)/", status=503, times=100)
    assert "failed 6 times (status 503)" in error_of(repository.read, FILE, 0, 5)
    assert len(hub.requests) == 6


def test_as_patient_as_the_server_wants(hub: HubServer, repository: HubRepository) -> None:
    hub.fail("GET /org/", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert repository.read(FILE, 0, 5) == CONTENT[:5]
    assert time.monotonic() - began >= 1
    hub.fail("GET /cdn/", status=429, headers={"RateLimit": '"resolvers";r=0;t=4000'})
    assert "wants 4000 seconds of patience" in error_of(repository.read, FILE, 0, 5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"ignore_range": True}, "answers a request for a part of it with status 200"),
        ({"shift_range": 10}, "'bytes 20-29/251000' and not bytes 10-19/251000"),
        ({"headers": {"Content-Range": "bytes 10-19/99"}}, "and not bytes 10-19/251000"),
        ({"headers": {"Content-Range": "nonsense"}}, "sends 'nonsense'"),
        ({"headers": {"Content-Length": "12"}, "body": b"x" * 12}, "sends 12 bytes and not 10"),
        ({"headers": {"Content-Encoding": "gzip"}}, "sends it encoded"),
        ({"headers": {"X-Repo-Commit": "0" * 40}}, "from another commit"),
        ({"headers": {"Transfer-Encoding": "chunked"}, "body": b"14\r\n" + b"x" * 20 + b"\r\n0\r\n\r\n"}, ""),
        ({"headers": {"ETag": '"other"'}}, "changed while it was read"),
    ],
)
def test_lies_are_errors(hub: HubServer, repository: HubRepository, fault: dict[str, Any], message: str) -> None:
    repository.read(FILE, 0, 3)
    hub.fail("GET /cdn/", **fault)
    problem = error_of(repository.read, FILE, 10, 10)
    assert problem.startswith(f"org/model/{FILE}: ")
    assert message in problem
    assert len(hub.requests) == 3  # not tried again


def test_a_body_that_ends_too_early_is_taken_up(hub: HubServer, repository: HubRepository) -> None:
    early = b"3\r\n" + CONTENT[:3] + b"\r\n0\r\n\r\n"
    without_length = {"Transfer-Encoding": "chunked", "Content-Length": "10"}
    hub.fail("GET /cdn/", headers=without_length, body=early)
    assert repository.read(FILE, 0, 10) == CONTENT[:10]
    assert hub.requests[-1].range == "bytes=3-9"


def test_an_endless_body_ends(hub: HubServer, repository: HubRepository) -> None:
    repository.read(FILE, 0, 3)
    endless = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    headers = {"Transfer-Encoding": "chunked"}
    hub.redirects = False
    hub.fail("GET /", headers=headers, body=endless * 1000, times=9)
    assert "more bytes than it was asked for" in error_of(repository.read, FILE, 0, 10)


def test_content_that_is_not_what_the_list_says(hub: HubServer, repository: HubRepository) -> None:
    hub.fail("GET /cdn/", body=CONTENT[:-1] + b"?")
    assert "another SHA-256" in error_of(repository.read, FILE)


def test_a_server_that_drips_is_left(
    hub: HubServer, repository: HubRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TIMEOUT", 0.3)
    monkeypatch.setattr(connection, "LEAST_RATE", 1 << 30)
    hub.fail("GET /cdn/", drip=0.05, piece=1)
    assert repository.read(FILE, 0, 100) == CONTENT[:100]  # the first try gave some of it
    hub.fail("GET /cdn/", delay=1.0)
    assert repository.read(FILE, 0, 100) == CONTENT[:100]
    assert len([request for request in hub.requests if "/cdn/" in request.path]) == 4


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../b", "a\\b", "C:\\x", "a//b", "./a", "a\nb", "a/./b", ""]
)
def test_names_that_lead_out(hub: HubServer, name: str) -> None:
    hub.add_repository("org/model", {"config.json": b"{}"})
    hub.repository("org/model").commit({name: Blob(b"")})
    assert "do not use this repository" in error_of(open_repository, "org/model")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[{}]", None),
        (b'[{"type": "file"}]', "makes no sense"),
        (b'[{"type": "file", "path": "a", "size": -1}]', "makes no sense"),
        (b'[{"type": "file", "path": "a", "size": 1e99}]', "makes no sense"),
        (b'{"a": 1}', "does not list files as the Hub does"),
        (b"<html>", "does not answer as the Hub does"),
        (b"[" * 100_000, "does not answer as the Hub does"),
    ],
)
def test_lists_that_make_no_sense(hub: HubServer, body: bytes, message: str | None) -> None:
    hub.add_repository("org/model", {"config.json": b"{}"})
    hub.fail("GET .*/tree/", body=body, headers={"Content-Length": str(len(body))})
    if message is None:
        assert not open_repository("org/model").files
    else:
        assert message in error_of(open_repository, "org/model")


def test_a_list_that_goes_on_elsewhere_gets_no_token(hub: HubServer) -> None:
    hub.add_repository("org/model", {"config.json": b"{}"})
    hub.fail("GET .*/tree/", headers={"Link": f'<{hub.other_url}/api/models/org/model/tree/main>; rel="next"'})
    assert "goes on at another server" in error_of(open_repository, "org/model")


def refusals(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each refusal says by `open_repository` and by `download_snapshot`, which must agree on it."""
    hub.add_repository("org/private", {"config.json": b"{}"}, private=True)
    hub.add_repository("org/gated", {"config.json": b"{}", FILE: b"x"}, gated=True)
    said = {}

    def both(case: str, model: str, call: Any = open_repository) -> None:
        one, other = error_of(call, model), error_of(download_snapshot, model)
        assert one.partition(": ")[2].partition("; ")[0] == other.partition(": ")[2].partition("; ")[0]
        said[case] = one

    def read_gated(model: str) -> None:
        open_repository(model).read(FILE)

    both("missing", "org/nothing")
    both("revision", "org/gated@nowhere")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    both("gated", "org/gated", read_gated)
    both("private", "org/private")
    monkeypatch.delenv("HF_TOKEN")
    both("gated, no token", "org/gated", read_gated)
    both("private, no token", "org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    both("wrong token", "org/gated")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    both("offline", "org/gated")
    return said


def test_one_line_for_each_refusal(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusals(hub, monkeypatch)
    assert "there is no such repository, or your token has no access to it" in said["missing"]
    assert "it has no branch, tag or commit nowhere" in said["revision"]
    assert said["gated"].endswith(f"it is gated; ask for access on its page at {hub.url}")
    assert "your token has no access" in said["private"]
    assert said["gated, no token"].endswith("and set HF_TOKEN to your token")
    assert "it is private: set HF_TOKEN to a token with access" in said["private, no token"]
    assert "the token is not valid" in said["wrong token"]
    assert "offline mode is on" in said["offline"]
    assert all(
        re.match(r"org/\w+(@nowhere)?: no such folder, and the Hub's repository", line) for line in said.values()
    )


def test_nobody_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 failed 6 times" in error_of(open_repository, "org/model")


def test_a_process_of_its_own(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add_repository("org/model", {FILE: CONTENT}, private=True)
    hub_server.fail("GET /(cdn|org)/", cut_after=100)
    code = (
        "from optimum_qguard.checkpoint.repository import open_repository as o\n"
        "r = o('org/model@main'); print(len(r.read('model.safetensors', 10, 1000)), r.bytes_read)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub_server.environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout == "1000 1000\n"
