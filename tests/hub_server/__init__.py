"""A Hugging Face Hub on this machine, for tests with the real clients: git-less commits, large files, ranges,
discussions, pull requests, webhooks, and everything that can go wrong on the way.

    server = HubServer()
    server.add_repository("org/model", {"config.json": b"{}"})
    server.fail("GET .*safetensors", status=503, times=2)
    subprocess.run([...], env=server.environment(tmp_path))
    server.close()

The real client reads ``HF_ENDPOINT`` when it is imported: use `environment` for a process, `use_here` in this one.
Tokens: ``hf_alice`` (of alice and org), ``hf_bob`` (of bob).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hub_server.faults import Fault, Faults
from hub_server.handler import Handler
from hub_server.pages import Request
from hub_server.store import Blob, Discussion, Repository, Store, is_lfs

TOKEN = "hf_alice"
OTHER_TOKEN = "hf_bob"

__all__ = ["OTHER_TOKEN", "TOKEN", "Blob", "Discussion", "Fault", "HubServer", "Repository", "Request"]


class HubServer:
    """Serves from the moment it is made until `close`.

    Attributes:
        url: where; `other_url` is the same under another host name, where large files are redirected to.
        requests: every request that was answered, in order.
        redirects: whether large files are served by `other_url`, as the Hub's are by its CDN.
        page_size: of listings.
        validate: whether model cards are checked as the Hub checks them.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.faults = Faults()
        self.requests: list[Request] = []
        self.redirects = True
        self.page_size = 1000
        self.connections = 0
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.other_url = f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repository(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | Path | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Make a repository from contents by name, or from a folder; the commit's hash."""
        with self.store.lock:
            self.store.repositories[repo_id] = Repository(repo_id, private, gated)
        self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        return self.commit(repo_id, files) if files else self.head(repo_id)

    def commit(self, repo_id: str, files: Mapping[str, bytes | Path | None], ref: str = "refs/heads/main") -> str:
        """Change files as somebody else would; the commit's hash."""
        changes = {
            name: None
            if content is None
            else Blob(content, is_lfs(name, 0 if isinstance(content, Path) else len(content)))
            for name, content in files.items()
        }
        with self.store.lock:
            return self.repository(repo_id).commit(changes, ref).sha

    def repository(self, repo_id: str) -> Repository:
        return self.store.repositories[repo_id]

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self._commit(repo_id, revision).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by name, at a branch, ``refs/pr/N`` or commit."""
        return {name: blob.bytes for name, blob in self._commit(repo_id, revision).files.items()}

    def _commit(self, repo_id: str, revision: str) -> Any:
        commit = self.repository(repo_id).resolve(revision)
        assert commit is not None, f"{repo_id} has no {revision}"
        return commit

    def fail(self, pattern: str, **what: Any) -> None:
        """Order a `Fault` for the next requests that match."""
        self.faults.add(Fault(pattern, **what))

    def bytes_sent(self, part_of_path: str = "") -> int:
        """How many bytes of bodies were sent, of files or of all answers."""
        return sum(request.sent for request in self.requests if part_of_path in request.path)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process whose Hub this is."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return inherited | ours | ({"HF_TOKEN": token} if token else {})

    def use_here(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> None:
        """Make this the Hub of huggingface_hub and transformers in this process."""
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import close_session
        from transformers.utils import hub as transformers_hub

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")[2]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}" + template)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made when it is first used, and kept
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""
