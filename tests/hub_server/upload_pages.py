"""Uploads and commits."""

from __future__ import annotations

import base64
import json
from typing import Any

from hub_server.cards import card_errors
from hub_server.pages import Pages, Refused, route
from hub_server.store import Blob, is_lfs
from hub_server.webhooks import deliver


class UploadPages(Pages):
    @route("POST", "/api/models/{id}/preupload/(?P<revision>[^/]+)")
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

    @route("POST", r"/{id}\.git/info/lfs/objects/batch")
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

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        if Blob(self.body).sha256 != oid:
            raise Refused(400, None, "SHA-256 does not match")
        self.hub.store.uploads[oid] = self.body
        self._send(200, b"")

    @route("POST", "/lfs-verify")
    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.store.uploads.get(wanted["oid"])
        if stored is None or len(stored) != wanted["size"]:
            raise Refused(404, None, "not uploaded")
        self._json({})

    @route("POST", "/api/models/{id}/commit/(?P<revision>[^/]+)")
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
