"""The page in a real browser."""

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from reports import clean, hostile, missing, skipped, suspicious

from optimum_qguard.scan.detectors import get_detector
from optimum_qguard.scan.report import ScanReport
from optimum_qguard.scan.writers import get_writer

Open = Callable[..., Any]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Shows reports in a window of a width; the page may say nothing on its console and ask for nothing but itself."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/report.html"
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def show(reports: Sequence[ScanReport], width: int = 1200, scheme: str = "light") -> Any:
        (tmp_path / "report.html").write_text(get_writer("html")(reports), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address, wait_until="networkidle")
        return page

    yield show
    for context in contexts:
        context.close()
    server.shutdown()
    server.server_close()
    assert complaints == []
    assert set(requests) <= {address, "data:,"}


def test_what_is_on_it(show: Open) -> None:
    page = show([suspicious()])
    assert page.title() == f"suspicious: {suspicious().name}"
    assert page.locator(".head .verdict").inner_text() == "! suspicious"
    assert page.locator("h2").inner_text() == "org/rigged"
    assert "1,750,000 of 134,515,008" in page.locator("dl").inner_text()
    assert page.locator("tr", has_text=get_detector("integrity").summary).count() == 1
    tables = page.locator("table:has(.severity)")
    assert tables.first.locator("tbody tr").count() == 10
    folded = page.locator("details")
    assert not folded.locator("tr").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("tbody tr").count() == 23
    assert "There is no model card." in folded.inner_text()


def test_a_long_statistic_leaves_the_sentence_its_room(show: Open) -> None:
    report = suspicious()
    long = report.findings[0].model_copy(update={"statistic": "share of blocks of 16 with weights 16 times the rest"})
    page = show([report.model_copy(update={"findings": [long]})])
    assert page.locator("td[data-label=Finding]").first.bounding_box()["width"] > 350


def test_plots(show: Open) -> None:
    """Bars are as high as the numbers, stand side by side, and the line of a clean checkpoint goes over them."""
    page = show([suspicious()])
    bars_plot, line_plot = suspicious().plots
    boxes = (
        page.locator("svg")
        .first.locator("rect.bar")
        .evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().toJSON())")
    )
    assert len(boxes) == len(bars_plot.y)
    highest = max(bars_plot.y)
    for box, y in zip(boxes, bars_plot.y, strict=True):
        assert box["height"] / max(box["height"] for box in boxes) == pytest.approx(y / highest, abs=0.01)
    assert all(a["right"] == pytest.approx(b["left"], abs=0.1) for a, b in itertools.pairwise(boxes))
    drawing = page.locator("svg").first.bounding_box()
    assert all(drawing["x"] <= box["left"] and box["right"] <= drawing["x"] + drawing["width"] for box in boxes)
    assert page.locator("svg").first.locator("polyline.expected").count() == 1
    title = page.locator("rect.bar title").first.text_content()
    assert re.fullmatch(r"steps from the middle of the cell -0\.4975: density \S+ \(1 in a clean checkpoint\)", title)
    line = page.locator("svg").nth(1)
    assert line.locator("circle.point").count() == len(line_plot.y)
    assert len(line.locator("polyline.line").get_attribute("points").split()) == len(line_plot.y)
    assert page.locator("figcaption b").all_inner_texts() == [bars_plot.title, line_plot.title]


def test_several_repositories(show: Open) -> None:
    page = show([suspicious(), clean(), missing(), skipped()])
    assert page.title() == page.locator("h1").inner_text() == "Scan of 4 repositories"
    assert page.locator("header .count").all_inner_texts() == [
        f"1 {verdict}" for verdict in ("! suspicious", "? inconclusive", "○ skipped", "✓ clean")
    ]
    assert page.locator("section .verdict.clean").count() == 1
    page.locator("header a", has_text="org/missing").click()
    assert page.evaluate("document.querySelector(':target h2').textContent") == "org/missing"
    assert "does not make it clean" in page.locator(":target").inner_text()


def test_hostile_names_are_inert(show: Open) -> None:
    page = show([hostile(), hostile()])
    assert "owned" not in page.title().replace("document.title='owned'", "")
    assert page.locator("script, img, iframe, [onerror], [style]").count() == 0
    assert page.locator("style").count() == 1
    assert (
        page.locator("h2").first.inner_text().startswith("<script>document.title='owned'</script></style></title>\"'>")
    )
    assert "{{ 7 * 7 }}" in page.locator("h2").first.inner_text()
    assert {link.get_attribute("href") for link in page.locator("a").all()} == {"#repository-1", "#repository-2"}
    assert page.locator("svg").count() == 4


def test_the_policy_lets_nothing_run(browser: Any, tmp_path: Path) -> None:
    """Even if a name could write markup, the page's policy would keep it from running, loading or styling."""
    attack = (
        "<script>window.ran = 1</script><style>h2 { color: rgb(1, 2, 3) }</style><img src='http://127.0.0.1:9/x.png'>"
    )
    html = get_writer("html")([clean()]).replace("<h2>", f"<h2 onclick='window.ran = 1'>{attack}")
    (tmp_path / "attacked.html").write_text(html)
    page = browser.new_page()
    asked: list[str] = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto((tmp_path / "attacked.html").as_uri())
    page.locator("h2").click()
    assert page.evaluate("window.ran") is None
    assert page.locator("h2").evaluate("h => getComputedStyle(h).color") != "rgb(1, 2, 3)"
    assert page.locator("h2").evaluate("h => getComputedStyle(h).fontWeight") == "700"
    assert [url for url in asked if url.startswith("http")] == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(show: Open, scheme: str) -> None:
    page = show([suspicious(), hostile(), missing()], width=360, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    cut = "all => all.filter(e => e.getBoundingClientRect().right > 360 || e.scrollWidth > e.clientWidth + 1).length"
    assert page.locator("p, td, h2, figure, dd").evaluate_all(cut) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_can_be_read(show: Open, scheme: str) -> None:
    """All text has a contrast of at least 4.5 : 1 to its card (WCAG 2.1, success criterion 1.4.3)."""
    page = show([suspicious(), clean(), missing(), skipped()], scheme=scheme)
    colour = "e => getComputedStyle(e).{}"
    card = page.locator("section").first.evaluate(colour.format("backgroundColor"))
    texts = page.locator("p, td, th, small, h2, h3, a, dt, dd, code, .verdict, .severity, summary, figcaption")
    for text in set(texts.evaluate_all("all => all.map(e => getComputedStyle(e).color)")):
        assert contrast(text, card) >= 4.5
    fill = page.locator("svg text").first.evaluate(colour.format("fill"))
    assert contrast(fill, card) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", text)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
