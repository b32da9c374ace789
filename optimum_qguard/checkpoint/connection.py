"""Asks the Hub for lists and for parts of files, and asks again when something on the way fails.

The answers are not trusted: what does not have exactly the form and length that was asked for is an error.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.checkpoint.hub import http_errors, hub_problem, not_readable, refusal

TRIES = 6
FIRST_WAIT = 1.0
"""Seconds before the second try, at most; twice as many before the next, and so on."""
LONGEST_WAIT = 300.0
"""Seconds: the Hub counts requests in windows of five minutes."""
TIMEOUT = 20.0
"""Seconds to connect, and between two pieces of an answer."""
LEAST_RATE = 4096
"""Bytes a second, on average over `TIMEOUT` and more."""

_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOST_LIST_BYTES = 64 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")

_T = TypeVar("_T")


class HubConnection:
    """To one repository at one commit; for several threads at once.

    Attributes:
        commit: the hash of the commit that a branch or tag meant when the connection was made.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        """Find the commit.

        Raises:
            CheckpointError: no such repository or revision, no access, no connection, offline mode.
        """
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise not_readable(repo_id, hub_problem(error)) from error
        self._name = repo_id
        self._revision = revision
        self._endpoint = constants.ENDPOINT
        self._no_hub = f"{constants.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT"
        self._headers: dict[str, str] = build_hf_headers(library_name="optimum-qguard") | {
            "Accept-Encoding": "identity"
        }
        self._http_errors = http_errors()
        self._lock = threading.Lock()
        self._etags: dict[str, str | None] = {}
        self._locations: dict[str, str] = {}
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        info, _ = self._json(f"{self._endpoint}/api/models/{repo_id}{at}")
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise not_readable(repo_id, self._no_hub)
        self.commit = commit

    def entries(self) -> Iterator[dict[str, Any]]:
        """Files and folders as the Hub lists them, not checked.

        Raises:
            CheckpointError: they cannot be listed.
        """
        url: str | None = f"{self._endpoint}/api/models/{self._name}/tree/{self.commit}?recursive=true&expand=false"
        while url is not None:
            page, url = self._json(url)
            if (
                not isinstance(page, list)
                or not all(isinstance(entry, dict) for entry in page)
                or not (page or not url)
            ):
                raise CheckpointError(f"{self._name}: {self._endpoint} does not list files as the Hub does")
            yield from page

    def read(self, file: str, start: int, length: int, size: int) -> bytes:
        """Exactly the bytes of ``file`` from ``start`` to before ``start + length``.

        A connection that is cut is taken up again at the byte that it had come to.

        Args:
            size: of the whole file.

        Raises:
            CheckpointError: the file cannot be read after `TRIES` tries; it is not what it was at the first request;
                or the server gives another part, or another length, than it was asked for.
        """
        received = bytearray()
        if length:
            self._persist(lambda: self._fetch(file, start, length, size, received))
        return bytes(received)

    def _fetch(self, file: str, start: int, length: int, size: int, received: bytearray) -> None:
        """Ask once, and append to ``received`` what comes."""
        from huggingface_hub import get_session, hf_hub_url

        first, end = start + len(received), start + length
        with self._lock:
            location = self._locations.get(file)
        url = location or hf_hub_url(self._name, file, revision=self.commit, endpoint=self._endpoint)
        headers = self._headers_for(url) | {"Range": f"bytes={first}-{end - 1}"}
        deadline = time.monotonic() + TIMEOUT + length / LEAST_RATE
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            if location is not None and response.status_code in (400, 401, 403, 404, 410):
                with self._lock:
                    self._locations.pop(file, None)  # such addresses are valid for a while only
                raise _Temporary("the address of the file is not valid any more", wait=0.0)
            self._check_status(response)
            self._check_range(file, response, first, end, size)
            if response.history:
                with self._lock:
                    self._locations[file] = str(response.url)
            for piece in response.iter_raw():
                received += piece
                if len(received) > length:
                    raise self._lie(file, "sends more bytes than it was asked for")
                if time.monotonic() > deadline:
                    raise _Temporary(f"it sends less than {LEAST_RATE} bytes a second")
        if len(received) < length:
            raise _Temporary("the connection was cut")

    def _check_range(self, file: str, response: Any, first: int, end: int, size: int) -> None:
        headers = response.headers
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
            given = (int(match[1]), int(match[2]) + 1) if match else None
            if match is None or given != (first, end) or match[3] not in ("*", str(size)):
                raise self._lie(
                    file, f"sends {headers.get('Content-Range')!r:.60} and not bytes {first}-{end - 1}/{size}"
                )
        elif response.status_code != 200 or (first, end) != (0, size):
            raise self._lie(file, f"answers a request for a part of it with status {response.status_code}")
        if headers.get("Content-Length", str(end - first)) != str(end - first):
            raise self._lie(file, f"sends {headers['Content-Length']:.20} bytes and not {end - first}")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self._lie(file, "sends it encoded although that was not asked for")
        for answer in (*response.history, response):
            if answer.headers.get("X-Repo-Commit", self.commit) != self.commit:
                raise self._lie(file, f"sends it from another commit than {self.commit}")
        etag = headers.get("ETag", "").removeprefix("W/").strip('"') or None
        with self._lock:
            known = self._etags.setdefault(file, etag)
        if known != etag:
            raise CheckpointError(
                f"{self._name}/{file}: changed while it was read (its ETag was {known} and is {etag}); start again"
            )

    def _json(self, url: str) -> tuple[Any, str | None]:
        """What a page says, and the address of the next one."""
        return self._persist(lambda: self._fetch_json(url))

    def _fetch_json(self, url: str) -> tuple[Any, str | None]:
        from huggingface_hub import get_session

        received = bytearray()
        deadline = time.monotonic() + 3 * TIMEOUT
        with get_session().stream(
            "GET", url, headers=self._headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            self._check_status(response)
            for piece in response.iter_bytes():
                received += piece
                if len(received) > _MOST_LIST_BYTES:
                    raise CheckpointError(f"{self._name}: the Hub's answer is longer than any model's; do not use it")
                if time.monotonic() > deadline:
                    raise _Temporary("it takes too long")
            following = response.links.get("next", {}).get("url")
        if following is not None and not following.startswith(f"{self._endpoint}/"):
            raise CheckpointError(f"{self._name}: the list of files goes on at another server ({following:.100})")
        try:
            return json.loads(received), following
        except (ValueError, RecursionError) as error:
            raise not_readable(self._name, self._no_hub) from error

    def _headers_for(self, url: str) -> dict[str, str]:
        """The token is for the Hub alone."""
        if urlsplit(url)[:2] == urlsplit(self._endpoint)[:2]:
            return self._headers
        return {name: value for name, value in self._headers.items() if name.lower() != "authorization"}

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status in _TEMPORARY:
            reason = "it is asked too often" if status == 429 else f"status {status}"
            raise _Temporary(reason, wait=_wanted_wait(response.headers))
        if status >= 400:
            raise not_readable(self._name, refusal(response, self._revision))

    def _persist(self, attempt: Callable[[], _T]) -> _T:
        """The result of ``attempt``, which is made up to `TRIES` times, with longer and longer breaks."""
        tries = 0
        while True:
            tries += 1
            try:
                return attempt()
            except _Temporary as problem:
                reason, wait = str(problem), problem.wait
            except self._http_errors as error:
                reason, wait = " ".join(str(error).split()) or type(error).__name__, None
            except OSError as error:  # offline mode is one
                raise not_readable(self._name, hub_problem(error, self._revision)) from error
            if wait is not None and wait > LONGEST_WAIT:
                raise CheckpointError(
                    f"{self._name}: the Hub wants {wait:.0f} seconds of patience ({reason}); try then"
                )
            if tries == TRIES:
                raise CheckpointError(
                    f"{self._name}: {self._endpoint} failed {TRIES} times ({reason}); check the network, or try again "
                    "later"
                )
            longest = FIRST_WAIT * 2 ** (tries - 1)
            time.sleep(random.uniform(longest / 2, longest) if wait is None else wait)  # noqa: S311 (no secret)

    def _lie(self, file: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._name}/{file}: the server {what}; it cannot be relied on: download the repository"
        )


class _Temporary(Exception):
    """Something that may go better next time; ``wait``: seconds until then, if that is known."""

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def _wanted_wait(headers: Any) -> float | None:
    """How many seconds the server wants to be left alone."""
    wanted = headers.get("Retry-After", "").strip()
    if wanted.isdecimal():
        return float(wanted)
    if wanted:
        try:
            return max(parsedate_to_datetime(wanted).timestamp() - time.time(), 0.0)
        except ValueError:
            return None
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None
