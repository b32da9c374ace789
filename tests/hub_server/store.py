"""What the local Hub holds: users, repositories with immutable commits, discussions, webhooks."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".png", ".model")


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    organizations: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class Blob:
    """A file's content: bytes, or a file on the disk (which may be sparse and large)."""

    content: bytes | Path
    lfs: bool = False

    @functools.cached_property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @functools.cached_property
    def sha256(self) -> str:
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    @functools.cached_property
    def oid(self) -> str:
        """What git calls it: of the pointer, for a file in large file storage."""
        content = self.pointer if self.lfs else self.bytes
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def bytes(self) -> bytes:
        return b"".join(self.pieces(0, self.size))

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to before ``end``, 64 KiB at a time."""
        if isinstance(self.content, bytes):
            for at in range(start, end, 1 << 16):
                yield self.content[at : min(at + (1 << 16), end)]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(1 << 16, end - start))):
                start += len(piece)
                yield piece


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, Blob]
    date: str


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str = "open"
    events: list[dict[str, Any]] = field(default_factory=list)
    created: str = ""

    @property
    def comments(self) -> list[str]:
        """What was written, oldest first."""
        return [event["data"]["latest"]["raw"] for event in self.events if event["type"] == "comment"]

    def add(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        event = {
            "id": f"{self.num:08d}{len(self.events):08d}",
            "type": kind,
            "createdAt": now(),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event

    def comment(self, author: str, text: str) -> dict[str, Any]:
        latest = {"raw": text, "html": f"<p>{text}</p>", "updatedAt": now(), "author": {"name": author}}
        return self.add("comment", author, {"edited": False, "hidden": False, "latest": latest, "editHistory": []})


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    def resolve(self, revision: str) -> Commit | None:
        """A commit by branch, tag, ``refs/...``, or the beginning of its hash."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return self.commits[found[0]] if len(found) == 1 else None

    def ref(self, revision: str) -> str:
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        ref: str = "refs/heads/main",
        *,
        parent: str | None = None,
        title: str = "Commit",
        description: str = "",
    ) -> Commit:
        """Put a commit on a ref. ``None`` deletes a file, or a folder whose name ends with a slash."""
        parent = parent or self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        for name, blob in changes.items():
            if blob is None:
                for old in [old for old in files if old == name or (name.endswith("/") and old.startswith(name))]:
                    del files[old]
            else:
                files[name] = blob
        content = json.dumps([self.id, parent, title, len(self.commits), {n: b.oid for n, b in files.items()}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = commit = Commit(sha, parent, title, description, files, now())
        self.refs[ref] = sha
        return commit

    def discuss(self, title: str, author: str, description: str, *, is_pull_request: bool) -> Discussion:
        discussion = Discussion(
            len(self.discussions) + 1,
            title,
            author,
            is_pull_request,
            status="draft" if is_pull_request else "open",
            created=now(),
        )
        discussion.comment(author, description)
        self.discussions.append(discussion)
        return discussion


class Store:
    """Everything, guarded by one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {"hf_alice": User("alice", ("org",)), "hf_bob": User("bob")}
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.webhooks: list[dict[str, Any]] = []


def is_lfs(name: str, size: int) -> bool:
    """Whether the Hub keeps a file in large file storage."""
    return name.endswith(_LFS_SUFFIXES) or size > 10 << 20


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
