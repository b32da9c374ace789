"""Files, or parts of them."""

from __future__ import annotations

import re
from urllib.parse import quote

from hub_server.pages import Pages, Refused, route
from hub_server.store import Blob


class FilePages(Pages):
    @route("GET", "/{id}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
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

    @route("GET", "/cdn/{id}/(?P<revision>[^/]+)/(?P<name>.+)")
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
