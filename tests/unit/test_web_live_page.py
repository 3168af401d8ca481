import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from tests.snapshots import NOW_NS, full_device, lost_device, node_snapshot

from jouletrace.snapshot import NodeSnapshot
from jouletrace.web.health import Readiness
from jouletrace.web.live.page import ASSETS, ASSETS_PATH, CONTENT_SECURITY_POLICY, LivePage, live_page

Client = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]
READY = Readiness(ready=True)
VOID = ("meta", "link", "input")


class Page(HTMLParser):
    """The tags, their attributes and the text of a page; fails on a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(snapshot: NodeSnapshot, readiness: Readiness = READY) -> str:
    return live_page(snapshot, readiness, version="1.2.3", telemetry_path="/metrics")


def test_without_javascript_it_shows_version_devices_power_and_source() -> None:
    page = Page(shown(node_snapshot(full_device(0))))
    assert "Version 1.2.3, source nvml" in page.text
    assert "0NVIDIA H200431 W700 Wpower_ringok" in page.text
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    # Relative, so that they hold behind a proxy below a path.
    assert links[1:4] == ["metrics", "-/ready", "-/healthy"]


def test_a_lost_device_shows_no_old_value() -> None:
    page = Page(shown(node_snapshot(lost_device(1)), Readiness(ready=False, reasons=("GPU 1: gone <now>",))))
    assert "–––lost" in page.text
    assert "33 W" not in page.text
    assert "GPU 1: gone <now>" in page.text


def test_a_stalled_sampler_shows_no_old_value() -> None:
    page = Page(shown(node_snapshot(full_device(0)), Readiness(ready=False, reasons=("x",), stalled=True)))
    assert "431" not in page.text
    assert "–––stalled" in page.text


def test_names_are_escaped() -> None:
    html = shown(node_snapshot(lost_device(1)))
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html


def test_no_devices() -> None:
    assert "No GPU is being watched." in shown(NodeSnapshot(NOW_NS, "nvml"))


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = Page(shown(node_snapshot()))
    for tag, attrs in page.tags:
        assert tag != "style"
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            assert "//" not in (attrs.get(name) or "")
        if tag == "script":
            assert attrs == {"type": "module", "src": "-/live/live.js"}


def test_texts_never_become_markup() -> None:
    """The policy demands it of the browser; this of whoever edits the files."""
    forbidden = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://")
    for name in ASSETS:
        text = resources.files("jouletrace.web.live").joinpath(name).read_text(encoding="utf-8")
        assert not forbidden.search(text), name


async def test_the_files_are_served_and_are_all_that_the_page_asks_for(aiohttp_client: Client) -> None:
    app = web.Application()
    app.add_routes(LivePage(node_snapshot, lambda: READY, "/metrics").routes())
    client = await aiohttp_client(app)
    answer = await client.get("/")
    assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    html = await answer.text()
    asked = set(re.findall(r'(?:src|href)="(-/live/[^"]+)"', html))
    assert asked == {ASSETS_PATH.lstrip("/") + name for name in ASSETS}
    for path in asked:
        file = await client.get("/" + path)
        assert file.status == 200
        assert file.content_type == ("text/css" if path.endswith("css") else "text/javascript")


@pytest.mark.parametrize("directive", ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"])
def test_the_policy_is_strict(directive: str) -> None:
    assert directive in CONTENT_SECURITY_POLICY.split("; ")
    assert "unsafe" not in CONTENT_SECURITY_POLICY


def test_accessible_basics() -> None:
    page = Page(shown(node_snapshot(replace(full_device(0), power_watts=None))))
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert {"main", "nav", "h1", "caption"} <= set(tags)
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for _, attrs in page.tags:
        for name in ("aria-labelledby", "for"):
            assert attrs.get(name) is None or attrs[name] in ids
