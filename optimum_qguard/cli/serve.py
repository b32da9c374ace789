"""``qguard serve``: a webhook bot that scans models when they change on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    secret_file: Annotated[
        Path | None,
        typer.Option(help="File with the webhook's secret, instead of QGUARD_WEBHOOK_SECRET.", show_default=False),
    ] = None,
    queue: Annotated[Path, typer.Option(help="File that holds what is to be scanned and what was.")] = Path(
        "qguard-bot.sqlite"
    ),
    workers: Annotated[int, typer.Option(help="Scans at the same time.")] = 1,
    write: Annotated[
        str, typer.Option(help="Where a report goes: a discussion, or a pull request to the card.")
    ] = "discussion",
    only_findings: Annotated[bool, typer.Option("--only-findings", help="Post only what is suspicious.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print reports and post nothing.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Look at every weight, not a sample.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds that a scan may take.")] = 1800,
    memory_limit: Annotated[float, typer.Option(help="GiB of memory that a scan may take.")] = 4,
    attempts: Annotated[int, typer.Option(help="How often a scan, or posting it, is tried.")] = 8,
    retry_delay: Annotated[
        float, typer.Option(help="Seconds before the second attempt; doubled for each further one.")
    ] = 30,
) -> None:
    """Scan models when their files change on the Hub, and post what was found; until it is interrupted.

    Webhooks go to /webhooks/scan and must carry the secret. Anybody can have a public model scanned on the page at /.
    /health and /metrics are for monitoring. Posting needs HF_TOKEN; QGUARD_READ_TOKEN is for scanning private models.
    """
    import math
    import os

    numbers = {"time-limit": time_limit, "memory-limit": memory_limit, "retry-delay": retry_delay}
    for name, value in numbers.items():
        if not math.isfinite(value) or value < 0:
            raise typer.BadParameter(f"--{name} is a number from 0 on, not {value:g}")
    from optimum_qguard.hub.bot.settings import READ_TOKEN_VARIABLE, BotSettings, read_secret

    options: dict[str, Any] = {"write": write}
    settings = BotSettings(
        secret=read_secret(secret_file),
        queue=queue,
        host=host,
        port=port,
        workers=workers,
        dry_run=dry_run,
        only_findings=only_findings,
        full=full,
        time_limit=time_limit,
        memory_limit=int(memory_limit * (1 << 30)),
        attempts=attempts,
        retry_delay=retry_delay,
        token=_token(),
        read_token=os.environ.get(READ_TOKEN_VARIABLE),
        **options,
    )
    _run(settings)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _run(settings: Any) -> None:
    import logging
    import signal
    import threading

    from optimum_qguard.hub.bot.errors import BotError

    try:
        import prometheus_client  # noqa: F401, I001  the quicker one first
        import gradio  # noqa: F401
    except ImportError as error:
        raise BotError(f"the bot needs {error.name}: pip install 'optimum-qguard[bot]'") from error
    from optimum_qguard.hub.bot.server import WEBHOOK, Bot

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("qguard.bot").setLevel(logging.INFO)
    end = threading.Event()
    previous = {number: signal.signal(number, lambda *_: end.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Bot(settings) as bot:
            typer.echo(f"Page: {bot.url}/  Webhook: {bot.url}{WEBHOOK}  Queue: {settings.queue}", err=True)
            end.wait()
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
