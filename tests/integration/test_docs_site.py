"""The documentation site in a real browser: every page, at two widths, in light and in dark mode."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urldefrag, urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from support import browser
from support.blocks import ROOT

pytestmark = pytest.mark.browser

DESKTOP = 1280
PHONE = 390
LAYOUT = """({
    width: document.scrollingElement.scrollWidth,
    links: Array.from(document.links, link => link.href),
    ids: Array.from(document.querySelectorAll("[id]"), element => element.id),
    broken_images: Array.from(document.images).filter(image => !image.naturalWidth).map(image => image.src),
    title: document.title,
})"""
SEARCH = """(async () => {
    const input = document.querySelector("[data-md-component=search-query]");
    input.focus();
    input.value = "max_lag";
    input.dispatchEvent(new Event("keyup"));
    for (let tries = 0; tries < 100; tries++) {
        const found = document.querySelectorAll(".md-search-result__item");
        if (found.length) return found.length;
        await new Promise(resolve => setTimeout(resolve, 100));
    }
    return 0;
})()"""


class Visit(NamedTuple):
    """What the browser reported about one page."""

    layout: dict[str, Any]
    phone_width: int
    requested: list[str]
    problems: list[str]


class Site(NamedTuple):
    address: str
    visits: dict[str, Visit]
    """By address."""
    search_results: int


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    pages = [page.relative_to(folder).as_posix() for page in sorted(folder.rglob("*.html")) if page.name != "404.html"]
    try:
        with browser.chromium(tmp_path_factory.mktemp("profile")) as tab:
            visits = {address + page: _visit(tab, address + page, dark=bool(n % 2)) for n, page in enumerate(pages)}
            tab.open(f"{address}index.html")
            yield Site(address, visits, tab.evaluate(SEARCH))
    finally:
        server.shutdown()
        server.server_close()


def _visit(tab: browser.Browser, url: str, dark: bool) -> Visit:
    tab.use_dark_mode(dark)
    tab.resize(DESKTOP)
    tab.open(url)
    layout = tab.evaluate(LAYOUT)
    tab.resize(PHONE)
    phone_width = tab.evaluate("document.scrollingElement.scrollWidth")
    return Visit(layout, phone_width, _requested(tab), list(_problems(tab)))


def _requested(tab: browser.Browser) -> list[str]:
    return [event["request"]["url"] for event in tab.reported("Network.requestWillBeSent")]


def _problems(tab: browser.Browser) -> Iterator[str]:
    """Yield errors: of the page's scripts, on the console, and of requests."""
    for event in tab.reported("Runtime.exceptionThrown"):
        yield str(event["exceptionDetails"])
    for event in tab.reported("Runtime.consoleAPICalled"):
        if event["type"] == "error":
            yield str(event["args"])
    for event in tab.reported("Log.entryAdded"):
        if event["entry"]["level"] == "error":
            yield f"{event['entry']['text']} ({event['entry'].get('url')})"
    for event in tab.reported("Network.responseReceived"):
        if event["response"]["status"] >= 400:
            yield f"{event['response']['status']} for {event['response']['url']}"


def test_every_page_of_the_navigation_was_visited(site: Site) -> None:
    assert len(site.visits) == len(list((ROOT / "docs").rglob("*.md")))
    assert all(visit.layout["title"] for visit in site.visits.values())


def test_no_page_scrolls_horizontally(site: Site) -> None:
    assert {url: visit.layout["width"] for url, visit in site.visits.items() if visit.layout["width"] > DESKTOP} == {}
    assert {url: visit.phone_width for url, visit in site.visits.items() if visit.phone_width > PHONE} == {}


def test_no_link_within_the_site_is_broken(site: Site) -> None:
    broken = [
        f"{url} links to {link}"
        for url, visit in site.visits.items()
        for link in visit.layout["links"]
        if link.startswith(site.address) and not _leads_somewhere(site, link)
    ]
    assert broken == []


def _leads_somewhere(site: Site, link: str) -> bool:
    page, anchor = urldefrag(link)
    if page == site.address:
        page = f"{page}index.html"
    return page in site.visits and (not anchor or anchor in site.visits[page].layout["ids"])


def test_every_picture_is_shown(site: Site) -> None:
    assert [image for visit in site.visits.values() for image in visit.layout["broken_images"]] == []


def test_no_page_asks_another_host_for_anything(site: Site) -> None:
    hosts = {
        urlsplit(url).netloc
        for visit in site.visits.values()
        for url in visit.requested
        if urlsplit(url).scheme not in ("data", "blob")
    }
    assert hosts == {urlsplit(site.address).netloc}


def test_no_page_reports_an_error(site: Site) -> None:
    assert [problem for visit in site.visits.values() for problem in visit.problems] == []


def test_the_search_finds_pages_without_a_server_of_its_own(site: Site) -> None:
    assert site.search_results > 0
