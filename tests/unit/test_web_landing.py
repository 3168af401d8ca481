import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

from tests.snapshots import NOW_NS, full_device, lost_device, node_snapshot

from jouletrace.snapshot import NodeSnapshot
from jouletrace.web.health import Readiness
from jouletrace.web.landing import CONTENT_SECURITY_POLICY, landing_page

READY = Readiness(ready=True)


class Page(HTMLParser):
    """The tags, their attributes and the visible text of a page; fails on a tag that is not closed."""

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
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def shown(snapshot: NodeSnapshot, readiness: Readiness = READY) -> str:
    return landing_page(snapshot, readiness, version="1.2.3", telemetry_path="/metrics")


def test_it_shows_version_devices_power_and_source() -> None:
    page = Page(shown(node_snapshot(full_device(0))))
    assert "Version 1.2.3, source nvml" in page.text
    assert "0NVIDIA H200431 W700 Wpower_ringok" in page.text
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["/metrics", "/-/ready", "/-/healthy"]


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


def test_nothing_from_outside_and_no_script() -> None:
    page = Page(shown(node_snapshot()))
    assert "script" not in {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "style")]
        assert "//" not in (attrs.get("href") or "")


def test_the_policy_allows_exactly_this_style() -> None:
    style = re.search(r"<style>(.*)</style>", shown(node_snapshot()), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'")


def test_accessible_basics() -> None:
    page = Page(shown(node_snapshot(replace(full_device(0), power_watts=None))))
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert {"main", "nav", "h1", "caption"} <= set(tags)
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert "color-scheme: light dark" in shown(node_snapshot())
