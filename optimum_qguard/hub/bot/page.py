"""The page for scanning by hand: through the same queue, without a token, and nothing is posted."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from optimum_qguard.hub.bot.errors import BotError
from optimum_qguard.hub.bot.payload import COMMIT_PATTERN, REPOSITORY_PATTERN
from optimum_qguard.hub.bot.queue import Job, JobQueue
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writers import get_writer

MOST_WAITING = 16
"""Scans that visitors may have waiting."""

_QUICK, _FULL = "Quick: a random sample of every tensor", "Full: every weight"
_REQUEST_SECONDS = 15.0
_POLL = 0.4
_SIGNS = {"clean": "✓", "suspicious": "!", "inconclusive": "?", "skipped": "-"}
_INTRODUCTION = """
# QGuard
Quantizing a model can bring out behaviour that its full-precision weights hide. Name a model on the Hub: its weights
are read, never run, and you see what is unusual about them. Nothing is posted. Private models are not seen from here:
scan them yourself with `qguard scan org/name`.
"""
CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
footer { display: none !important; }
#status, #report, #status > *, #report > * { padding: 0 !important; }
.verdict { display: flex; gap: 1rem; align-items: center; padding: 1rem 1.25rem; border-radius: .5rem; }
.verdict .sign { font-size: 1.75rem; font-weight: 700; line-height: 1; width: 2.75rem; height: 2.75rem; flex: none;
  border: 2px solid #fff; border-radius: 50%; display: flex; align-items: center; justify-content: center; }
.verdict .word { font-size: 1.25rem; font-weight: 700; }
.verdict p, .verdict .sign { margin: 0; color: #fff !important; overflow-wrap: anywhere; }
.verdict.clean { background: #14683c; } .verdict.suspicious { background: #a8201a; }
.verdict.inconclusive { background: #7a5200; } .verdict.skipped { background: #4a5563; }
.notice { padding: .85rem 1.25rem; border-radius: .5rem; border: 1px solid var(--border-color-primary);
  overflow-wrap: anywhere; }
.notice.problem { border-color: #a8201a; border-left-width: .35rem; }
iframe.report { display: block; width: 100%; height: 75vh; min-height: 30rem; background: #fff; border-radius: .5rem;
  border: 1px solid var(--border-color-primary); }
"""


def look() -> dict[str, Any]:
    """How the page looks, for `gradio.Blocks.launch`; with the reader's own fonts, so none are fetched."""
    fonts = ["system-ui", "sans-serif"]
    return {"css": CSS, "theme": gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])}


def build(queue: JobQueue, wake: Callable[[], None]) -> gradio.Blocks:
    """The page.

    Args:
        wake: tells the workers that there is something in the queue.
    """

    async def scan(model: str, depth: str) -> AsyncIterator[tuple[Any, Any, Any]]:
        def show(status: str, report: str = "", *, done: bool = True) -> tuple[Any, Any, Any]:
            button = gradio.update(interactive=done, value="Scan" if done else "Scanning …")
            return status, gradio.update(value=report, visible=bool(report)), button

        yield show(_notice("Looking for it on the Hub …"), done=False)
        try:
            repository, commit = await asyncio.to_thread(_resolve, model)
            if queue.count("queued", "page") >= MOST_WAITING:
                raise BotError("Too many scans are waiting already; try again in a few minutes.")
        except BotError as error:
            yield show(_notice(str(error), problem=True))
            return
        number, _ = queue.add(repository, commit, full=depth == _FULL, origin="page")
        wake()
        shown = ""
        while True:
            job = queue.get(number)
            assert job is not None
            if job.state in ("done", "failed"):
                break
            status = _waiting(job, queue.ahead(number))
            if status != shown:
                yield show(status, done=False)
                shown = status
            await asyncio.sleep(_POLL)
        yield show(*_outcome(job))

    with gradio.Blocks(title="QGuard: scan a model", analytics_enabled=False) as page:
        gradio.Markdown(_INTRODUCTION)
        model = gradio.Textbox(
            label="Model", placeholder="org/name, or org/name@revision", autofocus=True, max_lines=1, max_length=300
        )
        depth = gradio.Radio([_QUICK, _FULL], value=_QUICK, label="How much is looked at")
        button = gradio.Button("Scan", variant="primary")
        status = gradio.HTML(elem_id="status")
        report = gradio.HTML(elem_id="report", visible=False)
        for event in (button.click, model.submit):
            event(
                scan,
                [model, depth],
                [status, report, button],
                concurrency_limit=MOST_WAITING * 2,
                show_progress="hidden",
                api_visibility="private",
            )
    return page


def _resolve(model: str) -> tuple[str, str]:
    """The repository and its commit.

    Raises:
        BotError: there is no such public model.
    """
    repository, _, revision = model.strip().removeprefix("https://huggingface.co/").rstrip("/").partition("@")
    if not re.fullmatch(REPOSITORY_PATTERN, repository):
        raise BotError("That is no model on the Hub: write it as org/name, or org/name@revision.")
    try:
        info = HfApi(token=False).model_info(repository, revision=revision or None, timeout=_REQUEST_SECONDS)
    except GatedRepoError as error:
        raise BotError(f"{repository} is gated; scan it yourself with: qguard scan {repository}") from error
    except RevisionNotFoundError as error:
        raise BotError(f"{repository} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise BotError(f"There is no public model {repository} on the Hub.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BotError("The Hub does not answer; try again in a few minutes.") from error
    if not re.fullmatch(COMMIT_PATTERN, info.sha or ""):
        raise BotError(f"The Hub names no commit of {repository}.")
    return repository, str(info.sha)


def _waiting(job: Job, ahead: int) -> str:
    if job.state == "running":
        return _notice(f"Scanning {job.name} …")
    return _notice(f"{job.name} is queued; {ahead} before it." if ahead else f"{job.name} is next.")


def _outcome(job: Job) -> tuple[str, str]:
    """The verdict, and the report in a frame that may run nothing."""
    if job.report is None:
        return _notice(f"{job.name} could not be scanned: {job.reason or 'no reason is known'}", problem=True), ""
    report = ScanReport.model_validate_json(job.report)
    verdict = (
        f'<div class="verdict {report.verdict}" role="status"><span class="sign" aria-hidden="true">'
        f'{_SIGNS[report.verdict]}</span><div><p class="word">{report.verdict.capitalize()}</p>'
        f"<p>{html.escape(report.reason)}</p></div></div>"
    )
    document = html.escape(get_writer("html")([report]), quote=True)
    return verdict, f'<iframe class="report" sandbox="" title="Report of the scan" srcdoc="{document}"></iframe>'


def _notice(text: str, *, problem: bool = False) -> str:
    kind, role = ("notice problem", "alert") if problem else ("notice", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'
