"""Posts a report on the Hub, once for each commit."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optimum_qguard.checkpoint.card import CARD_FILE, merge_card
from optimum_qguard.checkpoint.errors import CheckpointError
from optimum_qguard.hub.bot import message
from optimum_qguard.hub.bot.errors import BotError

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

    from optimum_qguard.scan.report import ScanReport

TAG = "qguard-scanned"
"""It does not say with what verdict: tags are only ever added to a card, and that may change."""

_SECTION = "scan"
_LARGEST_CARD = 4 << 20

log = logging.getLogger("qguard.bot")


class Poster:
    """Writes as the owner of a token.

    What is on the Hub decides if something has been posted, not the queue: the bot may have been killed between posting
    and recording it. Only what this user wrote counts, so nobody can keep a report away by writing one like it.
    """

    def __init__(self, token: str, write: Literal["discussion", "card"]) -> None:
        """
        Raises:
            BotError: the token is not valid, or the Hub cannot be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self._api: HfApi = HfApi(token=token, library_name="optimum-qguard")
        self._write = write
        try:
            self.user: str = self._api.whoami()["name"]
        except (HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise BotError(f"the Hub does not accept the token in HF_TOKEN, or cannot be reached ({reason})") from error

    def post(self, report: ScanReport) -> str | None:
        """Post it, unless it has been posted.

        Returns:
            Where; ``None`` if the card says the same of the same files already.

        Raises:
            Exception: of the Hub's client; try again later.
        """
        commit = report.revision
        assert commit is not None
        known = self._find(report.model, commit)
        if known is not None:
            return known
        if self._write == "card":
            try:
                return self._propose_card(report)
            except CheckpointError as error:  # nobody can keep a report away by a card that cannot be edited
                log.warning("%s: the card is left alone, there will be a discussion (%s)", report.name, error)
        return self._open_discussion(report)

    def _find(self, repository: str, commit: str) -> str | None:
        return self._written(repository, message.marker(commit), commit)

    def _written(self, repository: str, marker: str, commit: str = "") -> str | None:
        """The discussion or pull request in which this user wrote a marker."""
        for discussion in self._api.get_repo_discussions(repository, author=self.user):
            if discussion.author != self.user or not message.is_title(discussion.title, commit):
                continue
            details = self._api.get_discussion_details(repository, discussion.num)
            # Anybody may comment there, and make a commit whose hash begins like another one's.
            own = [event for event in details.events if event.author == self.user]
            if any(marker in getattr(event, "content", "") for event in own):
                return str(details.url)
        return None

    def _open_discussion(self, report: ScanReport) -> str:
        made = self._api.create_discussion(
            report.model, title=message.title(report), description=message.discussion(report)
        )
        return str(made.url)

    def _propose_card(self, report: ScanReport) -> str | None:
        from huggingface_hub import CommitOperationAdd

        info = self._api.model_info(report.model, revision=report.revision, files_metadata=True)
        content = _fingerprint(info)
        with tempfile.TemporaryDirectory(prefix="qguard-card-") as name:
            folder = Path(name)
            card = folder / CARD_FILE
            before = self._card(report, info)
            if before is not None:
                card.write_bytes(before)
                # Merging the pull request makes a commit, which is scanned, and must not end in another one.
                # What the card says, its owner may have written.
                marker = message.content_marker(content, report.verdict)
                if marker in before.decode(errors="replace") and self._written(report.model, marker):
                    return None
            merge_card(folder, section_id=_SECTION, markdown=message.card_section(report, content), tags=[TAG])
            made = self._api.create_commit(
                report.model,
                [CommitOperationAdd(CARD_FILE, card.read_bytes())],
                commit_message=message.title(report),
                commit_description=f"{message.discussion(report)}\n{message.content_marker(content, report.verdict)}",
                create_pr=True,
                parent_commit=report.revision,
            )
        return made.pr_url

    def _card(self, report: ScanReport, info: ModelInfo) -> bytes | None:
        """
        Raises:
            CheckpointError: it is longer than any card.
        """
        sizes = [file.size or 0 for file in info.siblings or [] if file.rfilename == CARD_FILE]
        if not sizes:
            return None
        if sizes[0] > _LARGEST_CARD:
            raise CheckpointError(f"{CARD_FILE}: has {sizes[0]:,} bytes, which no card has")
        with tempfile.TemporaryDirectory(prefix="qguard-card-") as folder:
            path = self._api.hf_hub_download(
                report.model, CARD_FILE, revision=report.revision, cache_dir=folder, local_dir=None
            )
            return Path(path).read_bytes()


def _fingerprint(info: ModelInfo) -> str:
    """Of all files but the card, from what the Hub says of them."""
    digest = hashlib.sha256()
    for file in sorted(info.siblings or [], key=lambda file: file.rfilename):
        if file.rfilename != CARD_FILE:
            identity = file.lfs.sha256 if file.lfs is not None else file.blob_id
            digest.update(f"{file.rfilename}\0{identity}\0".encode())
    return digest.hexdigest()


class Printer:
    """Stands in for `Poster` in a dry run: prints what would be posted."""

    def __init__(self, write: Literal["discussion", "card"]) -> None:
        self._what = "a pull request to the card" if write == "card" else "a discussion"

    def post(self, report: ScanReport) -> None:
        """Print it."""
        sys.stdout.write(
            f"Would open {self._what} of {report.model}: {message.title(report)}\n{message.discussion(report)}\n\n"
        )
        sys.stdout.flush()
