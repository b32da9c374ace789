"""The Hub of these tests, by the real client."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hub_server import OTHER_TOKEN, HubServer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def test_a_folder_goes_up_and_comes_down_whole(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "inner/config.json").write_text("{}")
    api = HfApi()
    api.create_repo("org/model")
    commit = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert commit.oid == hub.head("org/model")
    found = Path(snapshot_download("org/model"))
    assert found.name == commit.oid
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (found / "inner/config.json").read_text() == "{}"


def test_an_answer_that_ends_the_connection_says_so(hub: HubServer) -> None:
    """A client that takes it for alive may send its next request into a connection that is being closed."""
    hub.add_repository("org/model")
    hub.fail("GET", status=500)
    address = hub.url.removeprefix("http://")
    connection = HTTPConnection(address)
    connection.request("GET", "/api/models/org/model")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Connection"]) == (500, "close")
    connection.request("GET", "/api/models/org/model")  # which makes a new one
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Connection"]) == (200, None)
    connection.close()


def test_commits_stay_what_they_were(hub: HubServer) -> None:
    first = hub.add_repository("org/model", {"a.txt": b"1"})
    hub.commit("org/model", {"a.txt": b"2"})
    assert Path(hf_hub_download("org/model", "a.txt", revision=first)).read_text() == "1"
    assert Path(hf_hub_download("org/model", "a.txt")).read_text() == "2"


def test_listing_in_pages_with_sizes_and_hashes(hub: HubServer) -> None:
    hub.page_size = 3
    hub.add_repository("org/model", {f"f/{n}.txt": b"x" * n for n in range(7)} | {"m.safetensors": b"abc"})
    tree = {entry.path: entry for entry in HfApi().list_repo_tree("org/model", recursive=True)}
    assert tree["f/6.txt"].size == 6
    assert tree["m.safetensors"].lfs.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(tree) == 10  # with the folder and .gitattributes


def test_refusals(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repository("org/private", {"a": b""}, private=True)
    hub.add_repository("org/gated", {"a": b""}, gated=True)
    api = HfApi(token=OTHER_TOKEN)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/private")
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("org/gated", "a")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/gated", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        HfApi().hf_hub_download("org/gated", "missing")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("org/other")
    assert HfApi().model_info("org/private").private
    with pytest.raises(ValueError, match="base_model"):
        HfApi().upload_file(path_or_fileobj=b"---\nbase_model: 3\n---\n", path_in_repo="README.md", repo_id="org/gated")


def test_pull_requests_and_discussions(hub: HubServer) -> None:
    hub.add_repository("org/model", {"a.txt": b"1"})
    api = HfApi(token=OTHER_TOKEN)
    commit = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="org/model", create_pr=True)
    assert commit.pr_num == 1
    assert hub.files("org/model")["a.txt"] == b"1"
    assert hub.files("org/model", "refs/pr/1")["a.txt"] == b"2"
    HfApi().merge_pull_request("org/model", 1)
    assert hub.files("org/model")["a.txt"] == b"2"
    made = api.create_discussion("org/model", "Report", description="text")
    api.comment_discussion("org/model", made.num, "more")
    details = api.get_discussion_details("org/model", made.num)
    assert [event.content for event in details.events] == ["text", "more"]
    assert [found.num for found in api.get_repo_discussions("org/model")] == [1, 2]


def test_webhooks_are_told(hub: HubServer) -> None:
    told = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append((self.headers["X-Webhook-Secret"], body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = HTTPServer(("127.0.0.1", 0), Listener)
    Thread(target=listener.handle_request, daemon=True).start()
    hub.add_repository("org/model")
    api = HfApi()
    watched = [{"type": "org", "name": "org"}]
    api.create_webhook(url=f"http://127.0.0.1:{listener.server_port}/", watched=watched, secret="s")
    commit = api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="org/model")
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    listener.server_close()
    assert told[0][0] == "s"
    assert told[0][1]["repo"]["headSha"] == told[0][1]["updatedRefs"][0]["newSha"] == commit.oid


def test_the_client_recovers_from_what_is_ordered(hub: HubServer) -> None:
    hub.add_repository("org/model", {"m.safetensors": bytes(300_000)})
    hub.fail("GET /cdn/", cut_after=100_000)
    assert Path(hf_hub_download("org/model", "m.safetensors")).stat().st_size == 300_000
    assert [request.sent for request in hub.requests if request.method == "GET"][-2:] == [100_000, 300_000]


def test_a_process_of_its_own(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add_repository("org/model", {"a.txt": b"1"}, private=True)
    code = "from huggingface_hub import hf_hub_download as d; print(open(d('org/model', 'a.txt')).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub_server.environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
