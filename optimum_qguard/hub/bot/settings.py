"""How the bot runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from optimum_qguard.hub.bot.errors import BotError

SECRET_VARIABLE = "QGUARD_WEBHOOK_SECRET"  # noqa: S105
READ_TOKEN_VARIABLE = "QGUARD_READ_TOKEN"  # noqa: S105
"""Token that the scanning processes read with, instead of the one that posts."""

_SHORTEST_SECRET = 16


@dataclass(frozen=True)
class BotSettings:
    """See `qguard serve --help`.

    Attributes:
        secret: that webhook requests must carry.
        queue: the file with what is to be done and what was done.
        host, port: where it listens; port 0 takes a free one.
        workers: scans at the same time.
        write: where a report goes.
        dry_run: print reports and post nothing.
        only_findings: post only if the verdict is ``"suspicious"``.
        full: look at every weight.
        time_limit: of one scan, in seconds.
        memory_limit: of one scan, in bytes, beyond what the interpreter and the libraries take.
        attempts: of one scan, or of posting its report, before it is given up.
        retry_delay: before the second attempt, in seconds; doubled for each further one.
        token: for posting; ``None`` only in a dry run.
        read_token: for scanning what a webhook named.
    """

    secret: str = field(repr=False)
    queue: Path
    host: str = "127.0.0.1"
    port: int = 7860
    workers: int = 1
    write: Literal["discussion", "card"] = "discussion"
    dry_run: bool = False
    only_findings: bool = False
    full: bool = False
    time_limit: float = 1800.0
    memory_limit: int = 4 << 30
    attempts: int = 8
    retry_delay: float = 30.0
    token: str | None = field(default=None, repr=False)
    read_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.secret:
            raise BotError(
                f"a webhook secret is needed: set {SECRET_VARIABLE} or give --secret-file, and the same in the "
                "webhook's settings on the Hub (openssl rand -hex 32 makes one)"
            )
        if len(self.secret) < _SHORTEST_SECRET:
            raise BotError(
                f"the webhook secret has fewer than {_SHORTEST_SECRET} characters and can be guessed; "
                "openssl rand -hex 32 makes one"
            )
        if self.token is None and not self.dry_run:
            raise BotError("a token that may write is needed to post reports: set HF_TOKEN, or give --dry-run")
        if self.write not in ("discussion", "card"):
            raise BotError(f"--write is discussion or card, not {self.write!r}")
        if not 0 <= self.port < 1 << 16:
            raise BotError(f"--port is between 0 and 65535, not {self.port}")
        for name in ("workers", "time_limit", "memory_limit", "attempts"):
            if getattr(self, name) <= 0:
                raise BotError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")


def read_secret(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The webhook's secret, from a file or the environment; empty if neither has one.

    Raises:
        BotError: the file cannot be read as text.
    """
    if file is None:
        return environment.get(SECRET_VARIABLE, "").strip()
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BotError(f"{file}: the webhook's secret cannot be read from it ({error})") from error
