"""Discussions and pull requests."""

from __future__ import annotations

import json
from typing import Any

from hub_server.pages import Pages, Refused, route
from hub_server.store import Discussion


class DiscussionPages(Pages):
    @route("GET", "/api/models/{id}/discussions")
    def list_discussions(self, repo: str) -> None:
        found = [_discussion_fields(found, repo) for found in self._repository(repo).discussions]
        page = found if self.query.get("p", "0") == "0" else []
        self._json({"discussions": page, "count": len(found), "start": 0, "numClosedDiscussions": 0})

    @route("POST", "/api/models/{id}/discussions")
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

    @route("GET", r"/api/models/{id}/discussions/(?P<num>\d+)")
    def discussion(self, repo: str, num: str) -> None:
        found = self._discussion(repo, num)
        fields = _discussion_fields(found, repo) | {"events": found.events, "diff": "", "filesWithConflicts": False}
        if found.is_pull_request:
            fields["changes"] = {"base": "refs/heads/main", "mergeCommitId": None}
        self._json(fields)

    @route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/comment")
    def comment(self, repo: str, num: str) -> None:
        found = self._discussion(repo, num)
        self._json({"newMessage": found.comment(self._signed_in().name, json.loads(self.body)["comment"])})

    @route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/status")
    def set_status(self, repo: str, num: str) -> None:
        found, wanted = self._discussion(repo, num), json.loads(self.body)
        found.status = wanted["status"]
        self._json({"newStatus": found.add("status-change", self._signed_in().name, {"status": found.status})})

    @route("POST", r"/api/models/{id}/discussions/(?P<num>\d+)/merge")
    def merge(self, repo: str, num: str) -> None:
        repository, found = self._repository(repo, write=True), self._discussion(repo, num)
        repository.refs["refs/heads/main"] = repository.refs[f"refs/pr/{num}"]
        found.status = "merged"
        self._json({})


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
