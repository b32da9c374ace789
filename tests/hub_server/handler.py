"""HTTP: the calls of huggingface_hub's client, as the Hub answers them."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_server.cards import card_data, card_errors
from hub_server.faults import NO_FAULT
from hub_server.store import Blob, Commit, Discussion, Repository, User, is_lfs
from hub_server.webhooks import deliver

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


def _route(method: str, pattern: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _ROUTES.append((method, re.compile(pattern.replace("{id}", _ID)), function.__name__))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
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

    # Repositories

    @_route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self._signed_in()
        organizations = [{"type": "org", "name": name, "id": name} for name in user.organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "id": user.name, "name": user.name, "orgs": organizations, "auth": token})

    @_route("POST", "/api/repos/create")
    def create(self) -> None:
        user, wanted = self._signed_in(), json.loads(self.body)
        repo = f"{wanted.get('organization') or user.name}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if not user.owns(repo):
            raise Refused(403, None, f"You don't have the rights to create a model under the namespace {repo}.")
        with self.hub.store.lock:
            if repo in self.hub.store.repositories:
                self._json({"error": "You already created this model repo", "url": url, "name": repo}, 409)
                return
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.add_repository(repo, private=private)
        self._json({"url": url, "name": repo, "id": repo})

    @_route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self._signed_in().name}/{wanted['name']}"
        self._repository(repo, write=True)
        del self.hub.store.repositories[repo]
        self._json({})

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        if errors and self.headers.get("Accept") == "text/plain":
            self._send(400, "\n".join(errors).encode(), {"Content-Type": "text/plain"})
            return
        content = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._json(content, 400 if errors else 200)

    @_route("GET", "/api/models/{id}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        data = card_data(commit.files["README.md"].bytes.decode()) if "README.md" in commit.files else {}
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in sorted(commit.files)]
        if self.query.get("blobs") in ("true", "True", "1"):
            siblings = [{"rfilename": name} | _blob_fields(commit.files[name]) for name in sorted(commit.files)]
        self._json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit.sha,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": data.get("tags") or [],
                "cardData": data or None,
                "siblings": siblings,
            }
        )

    @_route("GET", "/api/models/{id}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self._commit(self._repository(repo), revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(commit.files):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            recursive = self.query.get("recursive", "").lower() in ("true", "1")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": commit.sha, "size": 0, "path": path}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name} | _blob_fields(commit.files[name])
        if folder and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        at, found = int(self.query.get("cursor", "0")), list(entries.values())
        headers = {}
        if at + self.hub.page_size < len(found):
            rest = "&".join(f"{key}={value}" for key, value in self.query.items() if key != "cursor")
            target = (
                f"{self.hub.url}{quote(urlsplit(self.path).path, safe='/%')}?{rest}&cursor={at + self.hub.page_size}"
            )
            headers["Link"] = f'<{target}>; rel="next"'
        self._json(found[at : at + self.hub.page_size], **headers)

    @_route("POST", "/api/models/{id}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo: str, revision: str) -> None:
        commit = self._commit(self._repository(repo), revision)
        try:
            paths = json.loads(self.body)["paths"]
        except ValueError:
            paths = parse_qs(self.body.decode())["paths"]
        found = [path for path in paths if path in commit.files]
        self._json([{"type": "file", "path": path} | _blob_fields(commit.files[path]) for path in found])

    @_route("GET", "/api/models/{id}/refs")
    def refs(self, repo: str) -> None:
        refs = self._repository(repo).refs
        branches = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/heads/")]
        tags = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/tags/")]
        pulls = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/pr/")]
        self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})

    @_route("POST", "/api/models/{id}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def make_ref(self, repo: str, kind: str, name: str) -> None:
        repository = self._repository(repo, write=True)
        wanted = json.loads(self.body or b"{}")
        new = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{wanted['tag']}"
        start = wanted.get("startingPoint", "main") if kind == "branch" else name
        if new in repository.refs:
            raise Refused(409, None, f"{new} exists")
        repository.refs[new] = self._commit(repository, start).sha
        self._json({})

    # Files

    @_route("GET", "/{id}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(self._repository(repo, content=True), revision)
        blob = commit.files.get(name)
        headers = {"X-Repo-Commit": commit.sha}
        if blob is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, b"Entry not found", headers | message)
            return
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
            if self.hub.redirects:
                target = f"{self.hub.other_url}/cdn/{repo}/{commit.sha}/{quote(name)}"
                self._send(302, b"Found", headers | {"Location": target, "ETag": f'"{blob.etag}"'})
                return
        self._send_blob(blob, headers)

    @_route("GET", "/cdn/{id}/(?P<revision>[^/]+)/(?P<name>.+)")
    def cdn(self, repo: str, revision: str, name: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, None, "Only one auth mechanism allowed")
        commit = self._commit(self.hub.repository(repo), revision)
        self._send_blob(commit.files[name], {})

    def _send_blob(self, blob: Blob, headers: dict[str, str]) -> None:
        headers = headers | {
            "ETag": f'"{blob.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.fault.ignore_range:
            self._stream(200, blob.pieces(0, blob.size), blob.size, headers)
            return
        start = int(match[1]) + self.fault.shift_range
        end = min(int(match[2]) + self.fault.shift_range + 1 if match[2] else blob.size, blob.size)
        if start >= end:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{blob.size}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        self._stream(206, blob.pieces(start, end), end - start, headers)

    # Uploading

    @_route("POST", "/api/models/{id}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write="create_pr" not in self.query)
        commit = self._commit(repository, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            old = {"oid": commit.files[path].etag} if path in commit.files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | old)
        self._json({"files": answer})

    @_route("POST", r"/{id}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        self._repository(repo)
        self._signed_in()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store.uploads:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        if Blob(self.body).sha256 != oid:
            raise Refused(400, None, "SHA-256 does not match")
        self.hub.store.uploads[oid] = self.body
        self._send(200, b"")

    @_route("POST", "/lfs-verify")
    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.store.uploads.get(wanted["oid"])
        if stored is None or len(stored) != wanted["size"]:
            raise Refused(404, None, "not uploaded")
        self._json({})

    @_route("POST", "/api/models/{id}/commit/(?P<revision>[^/]+)")
    def commit(self, repo: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        repository, user = self._repository(repo, write=not create_pr), self._signed_in()
        head = self._commit(repository, revision)
        changes: dict[str, Blob | None] = {}
        summary: dict[str, Any] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value
            elif entry["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.store.uploads:
                    raise Refused(400, None, f"LFS object {value['oid']} was not uploaded")
                changes[value["path"]] = Blob(self.hub.store.uploads[value["oid"]], lfs=True)
            else:
                changes[value["path"]] = None
        readme = changes.get("README.md")
        if readme is not None and (errors := card_errors(readme.bytes.decode())):
            raise Refused(400, None, "; ".join(errors))
        if summary.get("parentCommit") not in (None, head.sha):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        with self.hub.store.lock:
            answer: dict[str, Any] = {}
            ref = repository.ref(revision)
            title, description = summary.get("summary", ""), summary.get("description", "")
            if create_pr:
                pull = repository.discuss(title, user.name, description, is_pull_request=True)
                pull.status, ref = "open", f"refs/pr/{pull.num}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{pull.num}"
            new = repository.commit(changes, ref, parent=head.sha, title=title, description=description)
        answer |= {"success": True, "commitOid": new.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{new.sha}"}
        self._json(answer)
        deliver(self.hub, repository, ref, head.sha, new.sha)

    # Discussions

    @_route("GET", "/api/models/{id}/discussions")
    def list_discussions(self, repo: str) -> None:
        found = [_discussion_fields(found, repo) for found in self._repository(repo).discussions]
        page = found if self.query.get("p", "0") == "0" else []
        self._json({"discussions": page, "count": len(found), "start": 0, "numClosedDiscussions": 0})

    @_route("POST", "/api/models/{id}/discussions")
    def create_discussion(self, repo: str) -> None:
        repository, user, wanted = self._repository(repo), self._signed_in(), json.loads(self.body)
        with self.hub.store.lock:
            discussion = repository.discuss(
                wanted["title"],
                user.name,
                wanted.get("description", ""),
                is_pull_request=bool(wanted.get("pullRequest")),
            )
            if discussion.is_pull_request:
                repository.refs[f"refs/pr/{discussion.num}"] = repository.refs["refs/heads/main"]
        self._json({"num": discussion.num, "pullRequest": discussion.is_pull_request})

    def _discussion(self, repo: str, num: str) -> Discussion:
        found = self._repository(repo).discussions
        if not 1 <= int(num) <= len(found):
            raise Refused(404, None, "Discussion not found")
        return found[int(num) - 1]

    @_route("GET", r"/api/models/{id}/discussions/(?P<num>\d+)")
    def discussion(self, repo: str, num: str) -> None:
        found = self._discussion(repo, num)
        fields = _discussion_fields(found, repo) | {"events": found.events, "diff": "", "filesWithConflicts": False}
        if found.is_pull_request:
            fields["changes"] = {"base": "refs/heads/main", "mergeCommitId": None}
        self._json(fields)

    @_route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/comment")
    def comment(self, repo: str, num: str) -> None:
        found = self._discussion(repo, num)
        self._json({"newMessage": found.comment(self._signed_in().name, json.loads(self.body)["comment"])})

    @_route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/status")
    def set_status(self, repo: str, num: str) -> None:
        found, wanted = self._discussion(repo, num), json.loads(self.body)
        found.status = wanted["status"]
        self._json({"newStatus": found.add("status-change", self._signed_in().name, {"status": found.status})})

    @_route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/merge")
    def merge(self, repo: str, num: str) -> None:
        repository, found = self._repository(repo, write=True), self._discussion(repo, num)
        repository.refs["refs/heads/main"] = repository.refs[f"refs/pr/{num}"]
        found.status = "merged"
        self._json({})

    # Webhooks

    @_route("GET", "/api/settings/webhooks")
    def list_webhooks(self) -> None:
        self._signed_in()
        self._json(self.hub.store.webhooks)

    @_route("POST", "/api/settings/webhooks")
    def create_webhook(self) -> None:
        self._signed_in()
        wanted = json.loads(self.body)
        hook = {"id": f"hook{len(self.hub.store.webhooks)}", "disabled": False, "secret": None, "domains": []} | wanted
        self.hub.store.webhooks.append(hook)
        self._json({"webhook": hook})

    @_route("DELETE", "/api/settings/webhooks/(?P<hook>[^/]+)")
    def delete_webhook(self, hook: str) -> None:
        self._signed_in()
        with contextlib.suppress(StopIteration):
            self.hub.store.webhooks.remove(next(found for found in self.hub.store.webhooks if found["id"] == hook))
        self._json({})


def _blob_fields(blob: Blob) -> dict[str, Any]:
    fields: dict[str, Any] = {"oid": blob.oid, "blobId": blob.oid, "size": blob.size}
    if blob.lfs:
        pointer = len(blob.pointer)
        fields["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": pointer}
    return fields


def _ref(name: str, sha: str) -> dict[str, str]:
    return {"name": name.split("/", 2)[2], "ref": name, "targetCommit": sha}


def _discussion_fields(found: Discussion, repo: str) -> dict[str, Any]:
    return {
        "num": found.num,
        "author": {"name": found.author},
        "repo": {"name": repo, "type": "model"},
        "title": found.title,
        "status": found.status,
        "createdAt": found.created,
        "isPullRequest": found.is_pull_request,
        "numComments": len(found.comments),
        "pinned": False,
    }
