"""HTTP: requests are read, given to the page that their path names, and answered, or spoilt by order."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server.faults import NO_FAULT
from hub_server.store import Commit, Repository, User

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclass
class Request:
    """One that came: ``status`` is 0 until it is answered, and ``sent`` grows while its body is sent."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    sent: int = 0


class Refused(Exception):
    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


_ROUTES: list[tuple[str, re.Pattern[str], str]] = []
_ID = r"(?P<repo>[^/]+/[^/]+?)"


def route(method: str, pattern: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _ROUTES.append((method, re.compile(pattern.replace("{id}", _ID)), function.__name__))
        return function

    return register


class Pages(BaseHTTPRequestHandler):
    """Finds the page of a request among its methods, and says what all pages say."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        with self.hub.store.lock:
            self.hub.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # Answering

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.body = self._read_body()
        self.fault = self.hub.faults.take(f"{self.command} {unquote(self.path)}")
        self.request_log = Request(
            self.command, unquote(self.path), self.headers.get("Range"), "Authorization" in self.headers
        )
        self.hub.requests.append(self.request_log)
        time.sleep(self.fault.delay)
        try:
            if self.fault.drop:
                self.close_connection = True
            elif self.fault.status is not None:
                self._send(self.fault.status, json.dumps({"error": "by order of the test"}).encode())
            else:
                self._dispatch(parts.path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _dispatch(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, name in _ROUTES:
                if wanted == method and (match := pattern.fullmatch(path)):
                    values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**values)
                    return
            raise Refused(404, None, f"no such page: {path}")
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._stream(status, iter([body]), len(body), {"Content-Type": "application/json"} | (headers or {}))

    def _stream(self, status: int, pieces: Iterator[bytes], length: int, headers: dict[str, str]) -> None:
        fault = self.fault
        if fault.body is not None:
            pieces = iter([fault.body])
        log = self.request_log
        log.status = status
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in ({"Content-Length": str(length)} | headers | fault.headers).items():
            self.send_header(name, value)
        if fault is not NO_FAULT:
            self.send_header("Connection", "close")  # or the client may ask again while it is being closed
        self.end_headers()
        if self.command == "HEAD" or status in (204, 304):
            return
        for piece in pieces if fault is NO_FAULT else self._spoilt(pieces):
            log.sent += len(piece)
            self.wfile.write(piece)

    def _spoilt(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """What is sent of them before the fault strikes."""
        fault, sent = self.fault, 0
        for piece in pieces:
            for at in range(0, len(piece), fault.piece):
                part = piece[at : at + fault.piece]
                if fault.cut_after is not None and sent + len(part) >= fault.cut_after:
                    self.close_connection = True
                    yield part[: fault.cut_after - sent]
                    return
                sent += len(part)
                yield part
                time.sleep(fault.drip)
        self.close_connection = True  # whatever was said of the length

    # Who asks, and for what

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.store.users:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return self.hub.store.users[token]

    def _signed_in(self) -> User:
        user = self._user()
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        return user

    def _repository(self, repo: str, *, content: bool = False, write: bool = False) -> Repository:
        user = self._user()
        found = self.hub.store.repositories.get(repo)
        if found is None or (found.private and (user is None or not user.owns(repo))):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if content and found.gated and (user is None or not user.owns(repo)):
            raise Refused(401 if user is None else 403, "GatedRepo", f"Access to model {repo} is restricted.")
        if write and not self._signed_in().owns(repo):
            raise Refused(403, None, f"You don't have the rights to write to {repo}.")
        return found

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit
