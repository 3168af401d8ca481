import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.diagnosed import SHARES, START_NS, VERDICTS, S, phase, request, result, series, undiagnosed

from jouletrace.trace.page import MOST_REQUESTS, render, write
from jouletrace.trace.recording import Recording, RecordingError, Stream

HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800<img src=//evil.example/x onerror=alert(1)>"


def recording(seconds: int = 70, name: str = "node7.json.gz") -> Recording:
    t_ns = START_NS + np.arange(0, seconds * S + 1, S // 50)
    return Recording({}, {"power_ring_20ms": Stream(t_ns, {"mw": np.full(len(t_ns), 4e5)})}, name=name)


class Page(HTMLParser):
    """A page's tags with their attributes, and its text; fails on a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.style = ""
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.style += data
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.cells if row[0] == first)

    def styles(self) -> list[str]:
        return [attributes.get("class") or "" for _, attributes in self.tags]


def test_the_page_needs_nothing_else() -> None:
    page = Page(render(result(), recording(), series()))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none';")
    # Its own style, byte by byte, and no other: attributes like style="" would be refused.
    assert base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    assert not {"script", "iframe", "img", "object", "form"} & {tag for tag, _ in page.tags}
    assert not any(name == "style" or name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert [a["href"] for _, a in page.tags if "href" in a] == ["data:,"]
    assert not any("src" in attributes for _, attributes in page.tags)
    assert not re.search(r"https?:|//\w|url\(|@import", render(result(), recording(), series()))


def test_everything_a_recording_says_is_escaped() -> None:
    found = result()
    found["phases"][0] = phase(
        0, HOSTILE, name=HOSTILE, labels={HOSTILE: HOSTILE}, flags=[HOSTILE], evidence={HOSTILE: HOSTILE}
    )
    found["phases"][0]["drivers"] = {HOSTILE: 1000.0}
    found["requests"] = [request(1, 1.0, id=HOSTILE, tenant=HOSTILE, method=HOSTILE), request(2, 2.0)]
    found["warnings"] = [HOSTILE]
    found["gpu"].update(name=HOSTILE, uuid=HOSTILE, driver_version=HOSTILE)
    over_time = series()
    over_time["verdict"][:10] = [HOSTILE] * 10
    over_time["flags"][:10] = [[HOSTILE]] * 10
    over_time["joules"][HOSTILE] = [1.0] * 70
    source = recording(name=HOSTILE)
    streams = {**source.streams, HOSTILE: source.streams["power_ring_20ms"]}
    html = render(found, Recording({}, streams, name=HOSTILE), over_time)
    html.encode()
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x00" not in html
    assert page.text.count("<script>alert(1)</script>") >= 15


def test_verdicts_and_flags_over_time() -> None:
    page = Page(render(result(), recording(), series()))
    for at, verdict in enumerate(VERDICTS):
        # Band, legend, phase and summary.
        assert page.styles().count(f"verdict{at}") == 4
        assert f"{verdict}, at " in page.text
    assert page.styles().count("flag") == 1
    assert "power_capped, at 40 s for 10.00 s" in page.text
    assert {f"driver{at}" for at in range(len(SHARES))} <= set(page.styles())


def test_the_phases_in_figures() -> None:
    page = Page(render(result(), recording(), series()))
    row = page.row("4")
    assert row[1:5] == ["phase3batch=3", "10.00", "400.0", "4,000.03,960.0 to 4,080.0"]
    assert row[5] == "memory_boundconfidence 87 %"
    assert "memory 1,500.0 J 37.5 %" in row[6]
    assert "links" not in row[6]
    assert row[7] == "1 figuredram_ratio 0.612"
    assert "power_capped" in page.row("5")[5]


def test_a_phase_of_which_nothing_is_known_shows_dashes() -> None:
    found = result()
    nothing = dict.fromkeys(("energy_joules", "low", "high", "average_watts", "verdict", "confidence"))
    found["phases"].append({**phase(7, "idle", flags=[], drivers={}, evidence={}), **nothing})
    page = Page(render(found, recording(), series()))
    row = page.row("8")
    assert row[1].startswith("phase7")
    assert row[2:] == ["10.00", "–", "–", "–", "–", "–"]


def test_the_account_adds_up() -> None:
    page = Page(render(result(), recording(), series()))
    names = ("requests", "parked: held, no work", "bare idle: nobody there", "work of no known request")
    joules = [float(page.row(name)[1].removesuffix(" J").replace(",", "")) for name in names]
    assert joules == [5_050, 2_000, 1_000, 19_950]
    assert page.row("the GPU")[1:] == ["28,000.0 J", "100.0 %"]
    assert page.row("memory")[1:] == ["10,500.0 J", "37.5 %"]
    assert "-0.100 %" in page.text


def test_the_requests_of_the_most_joules() -> None:
    page = Page(render(result(), recording(), series()))
    listed = [row[0] for row in page.cells if re.fullmatch(r"r\d+", row[0])]
    assert listed == [f"r{number}" for number in range(100, 100 - MOST_REQUESTS, -1)]
    assert page.row("r100") == ["r100", "tenant0", "100.099.0 to 101.0", "25.0", "75.0", "steps"]
    # Even numbers up to 100 add up to 2,550.
    assert page.row("tenant0")[1:] == ["50", "2,550.0 J", "50.5 %"]


def test_tenants_are_capped() -> None:
    found = result()
    found["requests"] = [request(number, 1.0, tenant=f"t{number}") for number in range(1000)]
    assert Page(render(found, recording(), series())).row("980 others")[1:] == ["980", "980.0 J", "98.0 %"]


@pytest.mark.parametrize("over_time", [{}, {"times_ns": [], "seconds": [], "verdict": [], "flags": [], "joules": {}}])
def test_a_recording_without_diagnosis(over_time: dict[str, list[float]]) -> None:
    page = Page(render(undiagnosed(), recording(), over_time))
    assert "Drivers and verdicts are not known for this recording." in page.text
    assert page.row("4") == ["4", "phase3batch=3", "10.00", "400.0", "4,000.03,960.0 to 4,080.0"]
    assert not any(style.startswith(("verdict", "driver")) for style in page.styles())


def test_nothing_but_the_least() -> None:
    found = undiagnosed()
    found.update(counter_joules=None, requests=[], phases=found["phases"][:1])
    found["phases"][0].update(average_watts=None, energy_joules=0.0)
    found["gpu"].update(power_limit_watts=None, memory_total_bytes=None, driver_version="")
    page = Page(render(found, Recording({}, {}), {}))
    assert "no counter in this recording" in page.text
    assert "driver unknown" in page.text
    assert "no GPM readings" in page.text


def test_how_it_was_measured() -> None:
    page = Page(render(result(), Recording({}, {"gpm_100ms": recording().streams["power_ring_20ms"]}), {}))
    assert "Energy source power_ring: the driver's ring of 20 ms mean powers" in page.text
    assert page.row("gpm_100ms")[1:] == ["3,501", "20"]
    assert "no GPM readings" not in page.text


def test_an_hour_stays_small() -> None:
    """3,600 s at 50 Hz, a verdict and flags that change each second, a thousand phases and requests."""
    hour, found = series(3600), result()
    hour["verdict"] = [VERDICTS[second % 7] for second in range(3600)]
    hour["flags"] = [[f"flag{second % 6}"] for second in range(3600)]
    found["phases"] = [
        phase(number % 7, VERDICTS[number % 7], start_ns=START_NS + number * S, end_ns=START_NS + (number + 3) * S)
        for number in range(1000)
    ]
    found["requests"] = [request(number, float(number)) for number in range(1000)]
    noisy = recording(3600)
    noisy.streams["power_ring_20ms"].values["mw"][::2] = 7e5
    html = render(found, noisy, hour)
    assert len(html.encode()) < 2_000_000
    assert "The 300 longest of 1,000 phases" in html


def test_write(tmp_path: Path) -> None:
    write(tmp_path / "report.html", "<!doctype html>é")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "<!doctype html>é"
    with pytest.raises(RecordingError, match="the report could not be written"):
        write(tmp_path / "missing" / "report.html", "")
