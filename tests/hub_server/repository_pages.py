"""Repositories: making them, what is in them, branches and tags."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from hub_server.cards import card_data, card_errors
from hub_server.pages import Pages, Refused, route
from hub_server.store import Blob


class RepositoryPages(Pages):
    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self._signed_in()
        organizations = [{"type": "org", "name": name, "id": name} for name in user.organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "id": user.name, "name": user.name, "orgs": organizations, "auth": token})

    @route("POST", "/api/repos/create")
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

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self._signed_in().name}/{wanted['name']}"
        self._repository(repo, write=True)
        del self.hub.store.repositories[repo]
        self._json({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        if errors and self.headers.get("Accept") == "text/plain":
            self._send(400, "\n".join(errors).encode(), {"Content-Type": "text/plain"})
            return
        content = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._json(content, 400 if errors else 200)

    @route("GET", "/api/models/{id}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        card = commit.files.get("README.md")
        data = {} if card is None else card_data(card.bytes.decode(errors="replace"))
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

    @route("GET", "/api/models/{id}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
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

    @route("POST", "/api/models/{id}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo: str, revision: str) -> None:
        commit = self._commit(self._repository(repo), revision)
        try:
            paths = json.loads(self.body)["paths"]
        except ValueError:
            paths = parse_qs(self.body.decode())["paths"]
        found = [path for path in paths if path in commit.files]
        self._json([{"type": "file", "path": path} | _blob_fields(commit.files[path]) for path in found])

    @route("GET", "/api/models/{id}/refs")
    def refs(self, repo: str) -> None:
        refs = self._repository(repo).refs
        branches = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/heads/")]
        tags = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/tags/")]
        pulls = [_ref(name, sha) for name, sha in refs.items() if name.startswith("refs/pr/")]
        self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})

    @route("POST", "/api/models/{id}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def make_ref(self, repo: str, kind: str, name: str) -> None:
        repository = self._repository(repo, write=True)
        wanted = json.loads(self.body or b"{}")
        new = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{wanted['tag']}"
        start = wanted.get("startingPoint", "main") if kind == "branch" else name
        if new in repository.refs:
            raise Refused(409, None, f"{new} exists")
        repository.refs[new] = self._commit(repository, start).sha
        self._json({})


def _blob_fields(blob: Blob) -> dict[str, Any]:
    fields: dict[str, Any] = {"oid": blob.oid, "blobId": blob.oid, "size": blob.size}
    if blob.lfs:
        pointer = len(blob.pointer)
        fields["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": pointer}
    return fields


def _ref(name: str, sha: str) -> dict[str, str]:
    return {"name": name.split("/", 2)[2], "ref": name, "targetCommit": sha}
