"""The bot: a webhook, a page, two addresses for monitoring, and the workers behind them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import logging
import os
import warnings
from types import TracebackType
from typing import Any

from fastapi import Request, Response
from fastapi.middleware import Middleware
from fastapi.responses import JSONResponse
from huggingface_hub import WebhooksServer

from optimum_qguard.hub.bot import page
from optimum_qguard.hub.bot.errors import BotError
from optimum_qguard.hub.bot.metrics import Metrics
from optimum_qguard.hub.bot.payload import parse_event
from optimum_qguard.hub.bot.poster import Poster, Printer
from optimum_qguard.hub.bot.queue import MOST_QUEUED, JobQueue
from optimum_qguard.hub.bot.settings import BotSettings
from optimum_qguard.hub.bot.worker import Workers

log = logging.getLogger("qguard.bot")

MOST_BYTES = 1 << 20
"""Of a webhook request."""

WEBHOOK = "/webhooks/scan"

_BODY_SECONDS = 10.0
_HEADER = "x-webhook-secret"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Bot:
    """Runs from `start` to `stop`, or in a ``with`` statement."""

    def __init__(self, settings: BotSettings) -> None:
        """
        Raises:
            BotError: the queue cannot be used, or the Hub does not accept the token.
        """
        self._settings = settings
        posts = (
            Printer(settings.write)
            if settings.dry_run or settings.token is None
            else Poster(settings.token, settings.write)
        )
        self._queue = JobQueue(settings.queue)
        self._metrics = Metrics(self._queue)
        threads = max(1, (os.cpu_count() or 1) // settings.workers)
        self._workers = Workers(self._queue, settings, posts, self._metrics, threads)
        self._page = page.build(self._queue, self._workers.wake)

    def __enter__(self) -> Bot:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and work, both in the background.

        Raises:
            BotError: the port is taken.
        """
        self._workers.start()
        server = self._webhooks()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints how to set up webhooks
                server.launch(
                    prevent_thread_lock=True,
                    share=False,
                    server_name=self._settings.host,
                    server_port=self._settings.port or None,
                    quiet=True,
                    max_file_size=1,  # nobody has anything to upload
                    ssr_mode=False,
                    footer_links=[],
                    app_kwargs={"middleware": [Middleware(_BodyLimit)]},
                    **page.look(),
                )
        except OSError as error:
            raise BotError(
                f"{self._settings.host}:{self._settings.port} cannot be listened on, probably because it is taken; "
                "give another --port"
            ) from error
        server.fastapi_app.get("/health")(self.health)
        server.fastapi_app.get("/metrics")(self.metrics)

    @property
    def url(self) -> str:
        """Where the page is."""
        return str(self._page.local_url).rstrip("/")

    def stop(self) -> None:
        """End everything. What was being scanned is queued again."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._page.close()
        self._workers.stop()
        self._queue.close()

    def _webhooks(self) -> Any:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # it is experimental
            server = WebhooksServer(ui=self._page)
        # Its own check reads the body first, and takes longer the more of the secret is right.
        server.webhook_secret = None
        server.add_webhook(WEBHOOK.removeprefix("/webhooks"))(self.webhook)
        return server

    async def webhook(self, request: Request) -> Response:
        """Queue what the Hub says has changed."""
        given = request.headers.get(_HEADER)
        if given is None or not hmac.compare_digest(given.encode(), self._settings.secret.encode()):
            return self._answer(401 if given is None else 403, "unauthorized", f"wrong or no {_HEADER}")
        try:
            body = await asyncio.wait_for(_read(request), _BODY_SECONDS)
        except asyncio.TimeoutError:
            return self._answer(408, "malformed", "the body did not come in time")
        if body is None:
            return self._answer(413, "too_large", f"the body is longer than {MOST_BYTES} bytes")
        try:
            event = parse_event(body)
        except ValueError as error:
            return self._answer(400, "malformed", str(error))
        if event is None:
            return self._answer(200, "ignored", "not about the files of a model")
        return await asyncio.to_thread(self._enqueue, event.repository, event.commit)

    def _enqueue(self, repository: str, commit: str) -> Response:
        if self._queue.count("queued", "webhook") >= MOST_QUEUED:
            return self._answer(503, "full", "too many commits are waiting")
        _, new = self._queue.add(repository, commit, full=self._settings.full)
        if not new:
            return self._answer(200, "duplicate", f"{repository}@{commit} is known")
        self._workers.wake()
        return self._answer(202, "accepted", f"{repository}@{commit} is queued")

    def _answer(self, status: int, outcome: str, message: str) -> Response:
        self._metrics.requests.labels(outcome).inc()
        return JSONResponse({"status": outcome, "message": message}, status)

    def health(self) -> Response:
        """Whether everybody works, and how much there is to do."""
        alive = self._workers.alive()
        content: dict[str, Any] = {str(state): count for state, count in self._queue.counts().items()}
        healthy = alive == self._settings.workers
        content |= {
            "status": "ok" if healthy else "degraded",
            "workers": self._settings.workers,
            "workers_alive": alive,
        }
        return JSONResponse(content, 200 if healthy else 503)

    def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type=_METRICS_TYPE)


class _BodyLimit:
    """Hangs up on whoever sends too much to any address: Gradio's own would take it all into memory."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        received = 0

        async def count() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= 2 * MOST_BYTES else {"type": "http.disconnect"}

        await self._app(scope, count if scope["type"] == "http" else receive, send)


async def _read(request: Request) -> bytes | None:
    """The body; ``None`` if it is too long. What a header says of its length is not believed."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)
